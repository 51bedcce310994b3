"""How well k-means finds the classes: a number of older papers. It needs scikit-learn and says little: see below."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from evaluation.classes.pictures import checked_pictures
from lookalike.errors import ResourceError


def normalized_mutual_information(
    vectors: Float[ndarray, "_ _"], ids: Int[ndarray, "_"], labels: Int[ndarray, "_"], *, seed: int = 0
) -> float:
    """NMI, in [0, 1], of the classes and as many k-means clusters; divided by the arithmetic mean of the entropies.

    It depends on the clustering and its seed, and with many small classes it is high for any vectors, so it takes part
    in no protocol. Clusters come from mini-batch k-means: a million pictures fit, and values differ in the second
    decimal from full k-means. Holds all vectors in float32.

    Source: Manning, Raghavan, Schütze 2008, "Introduction to Information Retrieval", section 16.3; Musgrave, Belongie,
    Lim 2020, arXiv:2003.08505, section 2.3, on what is wrong with it.

    Raises:
        DataError: see `checked_pictures`.
        ResourceError: scikit-learn is not installed.
    """
    pictures = checked_pictures("pictures", vectors, ids, labels)
    try:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.metrics import normalized_mutual_info_score
    except ImportError as error:
        raise ResourceError("NMI needs scikit-learn. Install lookalike with the extra [nmi].") from error
    num_classes = len(np.unique(pictures.labels))
    clustering = MiniBatchKMeans(num_classes, random_state=seed, n_init=3, batch_size=max(1024, 2 * num_classes))
    clusters = clustering.fit_predict(np.ascontiguousarray(pictures.vectors, dtype=np.float32))
    return float(normalized_mutual_info_score(pictures.labels, clusters))
