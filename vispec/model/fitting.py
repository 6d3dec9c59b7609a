"""What has to fit: a tree its target and its draft, options each other."""

import logging
from collections.abc import Mapping

from vispec.methods import LOOKUP, MODELS, VLM
from vispec.model.adaptive import AdaptiveTree
from vispec.model.drafts import Draft
from vispec.model.shape import AUTO, TreeShape
from vispec.model.target import Target

logger = logging.getLogger("vispec")


def fitted(shape: TreeShape, target: Target, draft: Draft) -> TreeShape:
    """The tree that a target can follow and a draft can fill; says so where it is smaller than what was asked for.

    Raises:
        ValueError: its rule goes level by level, the draft does not.
    """
    if isinstance(shape, AdaptiveTree) and not draft.by_level:
        raise ValueError(
            f"{draft.method} drafts all levels in one go, so a {shape.name} tree leaves nothing out: give a tree such "
            f"as {TreeShape()}"
        )
    chain = target.fit(shape)
    if chain.top_k != shape.top_k:
        logger.warning("%s follows chains alone: the tree is %s, not %s", type(target.model).__name__, chain, shape)
        shape = chain
    largest = draft.fit(shape)
    if (largest.total_token, largest.top_k) != (shape.total_token, shape.top_k):
        logger.warning(
            "a tree with total_token %d, depth %d and top_k %d cannot be filled, it is cut to total_token %d, top_k %d",
            *(shape.total_token, largest.depth, shape.top_k, largest.total_token, largest.top_k),
        )
    return largest


def check_branches(target: Target, shape: TreeShape) -> None:
    """Raises ValueError where a tree has branches and the target follows chains alone."""
    chain = target.fit(shape)
    if chain.top_k != shape.top_k:
        raise ValueError(
            f"{type(target.model).__name__} has layers that keep one state of the whole text, which cannot follow the "
            f"branches of the tree {shape}: give a chain, such as {chain}, or {AUTO}"
        )


def refuse_draft_options(
    method: str | None, path: str | None, place: Mapping[str, str | None], image_rows: float | None
) -> None:
    """ValueError where what is asked for is no draft: of an unknown method, or options of one without a path."""
    if method not in (None, LOOKUP, *MODELS):
        raise ValueError(f"method {method!r} is not one of {', '.join(MODELS)}, {LOOKUP}")
    if method == LOOKUP and path is not None:
        raise ValueError(f"spec_model_path {path}: method 'lookup' has no draft head, expected None")
    if path is None and any(place.values()):
        raise ValueError("spec_revision and spec_subfolder say where a draft head is, expected spec_model_path too")
    if path is None and image_rows is not None:
        raise ValueError(f"draft_image_rows is of method {VLM!r}, which takes a spec_model_path")
