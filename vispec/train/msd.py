"""Training of MSD's head: EAGLE-2's losses, and a schedule of text and of image samples.

The first half of the epochs shows text alone; then the share of samples with images rises evenly, to all in the last
epoch. An epoch has as many samples as there are of the rarer kind, each of them text or image by chance. As published,
40 epochs; data of one kind alone are all shown in every epoch (ours). The features are scored by the tokens that they
predict, as for the other heads; the published code scores them two tokens late.
"""

from functools import cached_property

import torch

from vispec.ge_data.sample_file import read_tokens
from vispec.train.samples import epoch_generator, epoch_groups
from vispec.train.trainer import Trainer

EPOCHS = 40


def image_share(epoch: int, epochs: int) -> float:
    """Probability that a sample of an epoch, counted from 0, has an image."""
    half = epochs / 2
    return max(0.0, (epoch + 1 - half) / half)


def shown(text: list[int], images: list[int], share: float, seed: int, epoch: int) -> list[int]:
    """The samples of an epoch: of each place the text or the image sample."""
    if not text or not images:
        return text or images
    chance = torch.rand(min(len(text), len(images)), generator=epoch_generator(seed, epoch)).tolist()
    return [image if drawn < share else one for one, image, drawn in zip(text, images, chance, strict=False)]


class MSDTrainer(Trainer):
    """Trains an MSD head; arguments as for `Trainer`."""

    def groups(self, epoch: int) -> list[list[int]]:
        chosen = shown(*self._kinds, image_share(epoch, self.recipe.epochs), self.recipe.seed, epoch)
        groups = epoch_groups([self.train_set.lengths[i] for i in chosen], self.group_size, self.recipe.seed, epoch)
        return [[chosen[place] for place in group] for group in groups]

    @cached_property
    def _kinds(self) -> tuple[list[int], list[int]]:
        """Training samples without and with images."""
        kinds: tuple[list[int], list[int]] = [], []
        for index, path in enumerate(self.train_set.paths):
            kinds[bool(read_tokens(path).images)].append(index)
        return kinds
