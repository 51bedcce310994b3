"""Similarities of a batch, a tile at a time, and the way back: from their gradient to that of the embeddings."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training.losses.mixing import Mixture
from training.losses.sparse_matrix import SparseMatrix, sparse_matrix

# A list of pairs costs several times more per entry than a dense matrix does; where they meet matters little.
MAX_SPARSE_SHARE = 1 / 32
# Bounds a list of pairs to 3 MB; a learned batch of 4096 has some 50,000.
_MAX_PENDING_PAIRS = 1 << 17


@dataclass(frozen=True, slots=True)
class Block:
    """Some samples: what a tile needs to know of its rows or columns."""

    samples: Int[Tensor, "block"]
    images: Int[Tensor, "images"]  # rows of the batch that they are made of
    embeddings: Float[Tensor, "images dim"]
    expansion: SparseMatrix | None = None  # [block, images]; None where each sample is an image
    reduction: SparseMatrix | None = None  # its transpose


class ImageSimilarities:
    """Inner products of all embeddings with all of them, the gallery.

    A similarity costs 2 * dim operations, its gradient at most twice that.
    """

    def __init__(self, embeddings: Float[Tensor, "batch dim"]) -> None:
        self.embeddings = embeddings
        self._gradient: Tensor | None = None
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def block(self, samples: Int[Tensor, "block"]) -> Block:
        first = int(samples[0]) if len(samples) else 0
        is_contiguous = torch.equal(samples, torch.arange(first, first + len(samples), device=samples.device))
        rows = self.embeddings[first : first + len(samples)] if is_contiguous else self.embeddings[samples]
        return Block(samples, samples, rows)

    def between(self, rows: Block, columns: Block) -> Float[Tensor, "_rows _columns"]:
        """A new tensor [rows, columns], the caller's to write to."""
        return rows.embeddings @ columns.embeddings.T

    def add_gradient(self, rows: Block, columns: Block, slopes: Float[Tensor, "rows columns"]) -> None:
        """Takes in the derivative of the loss by each entry of `between(rows, columns)`."""
        # Each similarity has two arguments.
        gradient = self._sum()
        gradient.index_add_(0, rows.images, slopes @ columns.embeddings)
        gradient.index_add_(0, columns.images, slopes.T @ rows.embeddings)

    def add_sparse_gradient(
        self,
        samples: Int[Tensor, "queries"],
        rows: Int[Tensor, "pairs"],
        columns: Int[Tensor, "pairs"],
        slopes: Float[Tensor, "pairs"],
    ) -> None:
        """The same for pairs (samples[row], column); entries at the same place add up."""
        self._pending.append((samples[rows], columns, slopes))
        if sum(len(slopes) for _, _, slopes in self._pending) > _MAX_PENDING_PAIRS:
            self._add_pending()

    def gradient(self) -> Float[Tensor, "batch dim"]:
        """By every embedding, of all that was added."""
        self._add_pending()
        return self._sum()

    def _sum(self) -> Float[Tensor, "batch dim"]:
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.embeddings)
        return self._gradient

    def _add_pending(self) -> None:
        if not self._pending:
            return
        queries, gallery, slopes = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        both_ways = sparse_matrix(
            torch.cat([queries, gallery]),
            torch.cat([gallery, queries]),
            torch.cat([slopes, slopes]),
            num_rows=len(self.embeddings),
        )
        product = both_ways.times(self.embeddings)
        self._gradient = product if self._gradient is None else self._gradient.add_(product)


class MixedSimilarities:
    """The same for the samples of a mixture: W S Wᵀ from the embeddings' S. No mixed embedding is ever formed."""

    def __init__(self, embeddings: Float[Tensor, "batch dim"], mixture: Mixture) -> None:
        self._images = ImageSimilarities(embeddings)
        self._mixture = mixture

    def block(self, samples: Int[Tensor, "block"]) -> Block:
        mixture, images = self._mixture.select(samples)
        return Block(
            samples=samples,
            images=images,
            embeddings=self._images.block(images).embeddings,
            expansion=mixture.expansion(),
            reduction=mixture.reduction(num_images=len(images)),
        )

    def between(self, rows: Block, columns: Block) -> Float[Tensor, "rows columns"]:
        # Rows of a matrix are mixed at the speed of memory, columns are not: mix, turn, mix.
        assert rows.expansion is not None
        assert columns.expansion is not None
        of_images = self._images.between(columns, rows)
        return rows.expansion.times(columns.expansion.times(of_images).T.contiguous())

    def add_gradient(self, rows: Block, columns: Block, slopes: Float[Tensor, "rows columns"]) -> None:
        assert rows.reduction is not None
        assert columns.reduction is not None
        by_images = rows.reduction.times(slopes)  # [images, columns]
        of_images = columns.reduction.times(by_images.T.contiguous())
        self._images.add_gradient(columns, rows, of_images)

    def add_sparse_gradient(
        self,
        samples: Int[Tensor, "queries"],
        rows: Int[Tensor, "pairs"],
        columns: Int[Tensor, "pairs"],
        slopes: Float[Tensor, "pairs"],
    ) -> None:
        # The samples of two classes share few pairs of images, so these are summed up before they are multiplied.
        mixture, images = self._mixture.select(samples)
        batch = len(self._images.embeddings)
        of_images = slopes.new_zeros(len(images), batch)
        for query_parent in range(2):
            by_query = slopes * mixture.shares[rows, query_parent]
            starts = mixture.parents[rows, query_parent] * batch
            for gallery_parent in range(2):
                of_images.view(-1).index_add_(
                    0,
                    starts + self._mixture.parents[columns, gallery_parent],
                    by_query * self._mixture.shares[columns, gallery_parent],
                )
        if int(of_images.count_nonzero()) > MAX_SPARSE_SHARE * of_images.numel():
            everything = self._images.block(torch.arange(batch, device=images.device))
            self._images.add_gradient(self._images.block(images), everything, of_images)
        else:
            image_rows, image_columns = of_images.nonzero(as_tuple=True)
            self._images.add_sparse_gradient(images, image_rows, image_columns, of_images[image_rows, image_columns])

    def gradient(self) -> Float[Tensor, "batch dim"]:
        return self._images.gradient()


Similarities = ImageSimilarities | MixedSimilarities
