"""Pictures that show what batch normalisation does, each computed by one module: `python -m examples.gallery all`.

A module has the name of its picture and four parts: SETTINGS, a dict of what can be chosen; `compute(data, settings)`,
which returns numbers that JSON can hold; `facts(results)`, the rows of its table in docs/gallery.md; and
`draw(results)`, which needs nothing but those numbers. docs/gallery.md has the pictures and says what they show.
"""

PICTURES = ("activations", "learning_rate", "predictiveness", "batch_size", "axes", "running_mean", "conv_bias")
