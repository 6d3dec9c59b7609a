"""The methods: as flags and configs name them, and as texts do."""

HEADS = {
    "vispec": "ViSpec", "eagle2": "EAGLE-2", "eagle3": "EAGLE-3", "msd": "MSD", "specvlm": "SpecVLM",
    "medusa": "Medusa",
}  # fmt: skip
"""Those that have draft heads."""
VLM = "vlm"
"""A smaller VLM."""
MODELS = {**HEADS, VLM: "smaller VLM"}
"""Those whose drafts are models of their own, in folders or on the hub."""
LOOKUP = "lookup"
"""The one that drafts without a head."""
BASELINE, GENERATE = "baseline", "generate"
"""Our own plain loop, and transformers' generate()."""
UNDRAFTED = (BASELINE, GENERATE)


def method_of(name: str) -> str:
    """The method of a head that has a label of its own: vispec of vispec-blind."""
    return name.partition("-")[0]
