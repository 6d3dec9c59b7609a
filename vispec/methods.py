"""The methods that have draft heads: as flags and configs name them, and as texts do."""

HEADS = {"vispec": "ViSpec", "eagle2": "EAGLE-2", "eagle3": "EAGLE-3", "msd": "MSD", "medusa": "Medusa"}
LOOKUP = "lookup"
"""The one that drafts without a head."""
