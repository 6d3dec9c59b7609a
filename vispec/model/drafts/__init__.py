"""What drafts: one file a method, behind the `Draft` of base.py; the files of draft heads beside them."""

from vispec.model.drafts.base import BaseHead, Draft, build_head, load_draft
from vispec.model.drafts.eagle2 import DraftHead
from vispec.model.drafts.eagle3 import Eagle3Head
from vispec.model.drafts.lookup import PromptLookup
from vispec.model.drafts.medusa import MedusaHead
from vispec.model.drafts.msd import MSDHead
from vispec.model.drafts.specvlm import SpecVLMHead
from vispec.model.drafts.vispec import ViSpecHead
from vispec.model.drafts.vlm import VLMDraft

__all__ = [
    "BaseHead", "Draft", "DraftHead", "Eagle3Head", "MSDHead", "MedusaHead", "PromptLookup", "SpecVLMHead", "VLMDraft",
    "ViSpecHead", "build_head", "load_draft",
]  # fmt: skip
