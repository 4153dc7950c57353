"""The stability map: which adapter keeps a model whole at which learning rate."""
