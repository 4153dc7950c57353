"""Does it stay forgotten? Attacks on an unlearned model: relearn, quantize, paraphrase.

`run.attack` is the whole; each attack is a module with `NAME`, `run`, `table` and `draw`. Every
attack loads the models anew and works on its own copy: no file that was given is written to.
"""
