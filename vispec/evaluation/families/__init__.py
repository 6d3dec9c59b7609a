"""What decoding does with the families of VLMs that transformers has, tried on tiny random models.

A family is data: the values of its config and how its processor lays out images and videos (`squares`, `tiles`,
`grids`, `windows`, …; all of them in `registry`). `trial` compares the answers with the model's own generate(), `table`
writes docs/models.md.
"""
