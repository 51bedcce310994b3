"""Similarities of a batch, some rows at a time, and the way back: from their gradient to that of the embeddings."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training.losses.mixing import Mixture
from training.losses.sparse_matrix import sparse_matrix

# A list of pairs costs several times more per entry than a dense matrix does; where they meet matters little.
MAX_SPARSE_SHARE = 1 / 8
# Bounds a list of pairs to 3 MB; a learned batch of 4096 has some 50,000.
_MAX_PENDING_PAIRS = 1 << 17


class ImageSimilarities:
    """Inner products of all embeddings with all of them, the gallery.

    A row costs 2 * batch * dim operations, its gradient at most twice that.
    """

    def __init__(self, embeddings: Float[Tensor, "batch dim"]) -> None:
        self.embeddings = embeddings
        self._gradient = torch.zeros_like(embeddings)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def rows(self, samples: Int[Tensor, "queries"]) -> Float[Tensor, "queries gallery"]:
        """A new tensor, the caller's to write to."""
        return self.embeddings[samples] @ self.embeddings.T

    def add_gradient(self, samples: Int[Tensor, "queries"], slopes: Float[Tensor, "queries gallery"]) -> None:
        """Takes in the derivative of the loss by each entry of `rows(samples)`."""
        # Each similarity has two arguments: the query's embedding and the gallery image's.
        self._gradient.index_add_(0, samples, slopes @ self.embeddings)
        self._gradient.addmm_(slopes.T, self.embeddings[samples])

    def add_sparse_gradient(
        self,
        samples: Int[Tensor, "queries"],
        rows: Int[Tensor, "pairs"],
        columns: Int[Tensor, "pairs"],
        slopes: Float[Tensor, "pairs"],
    ) -> None:
        """The same, naming only entries that are not 0; entries at the same place add up."""
        self._pending.append((samples[rows], columns, slopes))
        if sum(len(slopes) for _, _, slopes in self._pending) > _MAX_PENDING_PAIRS:
            self._add_pending()

    def gradient(self) -> Float[Tensor, "batch dim"]:
        """By every embedding, of all that was added."""
        self._add_pending()
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
        self._gradient += both_ways.times(self.embeddings)


class MixedSimilarities:
    """The same for the samples of a mixture: W S Wᵀ from the embeddings' S. No mixed embedding is ever formed."""

    def __init__(self, embeddings: Float[Tensor, "batch dim"], mixture: Mixture) -> None:
        self._images = ImageSimilarities(embeddings)
        self._mixture = mixture
        self._expansion = mixture.expansion()
        self._reduction = mixture.reduction(num_images=len(embeddings))

    def rows(self, samples: Int[Tensor, "queries"]) -> Float[Tensor, "queries gallery"]:
        mixture, images = self._mixture.select(samples)
        # Rows of a matrix are mixed at the speed of memory, columns are not: mix, turn, mix.
        of_images = self._images.embeddings @ self._images.embeddings[images].T  # [batch, images]
        return mixture.expansion().times(self._expansion.times(of_images).T.contiguous())

    def add_gradient(self, samples: Int[Tensor, "queries"], slopes: Float[Tensor, "queries gallery"]) -> None:
        mixture, images = self._mixture.select(samples)
        by_images = mixture.reduction(num_images=len(images)).times(slopes)  # [images, gallery]
        self._images.add_gradient(images, self._reduction.times(by_images.T.contiguous()).T)

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
            self._images.add_gradient(images, of_images)
        else:
            image_rows, image_columns = of_images.nonzero(as_tuple=True)
            self._images.add_sparse_gradient(images, image_rows, image_columns, of_images[image_rows, image_columns])

    def gradient(self) -> Float[Tensor, "batch dim"]:
        return self._images.gradient()


Similarities = ImageSimilarities | MixedSimilarities
