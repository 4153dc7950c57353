"""The two ways a run ends that are not a bug."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names it and the remedy. Nothing was done."""


class NonFiniteError(ArithmeticError):
    """The loss or its gradient stopped being finite; the last checkpoint is intact."""
