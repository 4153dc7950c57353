"""The model that the tests of unlearning train: it knows its rows after a second."""

from fastbound.unlearning.demo.small_model import SmallModelConfig

TINY_MODEL = SmallModelConfig(
    hidden_size=32,
    intermediate_size=48,
    heads=2,
    vocabulary=400,
    lr=1e-2,
    batch_size=5,
    known_loss=0.2,
)
