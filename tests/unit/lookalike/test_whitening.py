from pathlib import Path

import numpy as np
import pytest
import torch

from lookalike.encoder import create_encoder, embed_pixels, load_encoder, save_encoder, with_input
from lookalike.encoder_settings import EncoderSettings, InputSettings, WhiteningSettings
from lookalike.errors import ArtifactError, ChecksumMismatch, DataError, SettingsError
from lookalike.whitening import VectorMoments, Whitening, learned_whitening, pca_whitening

DIM = 6
SMALL = EncoderSettings(backbone="resnet10t", projection_dim=DIM, input=InputSettings(size=32))


def correlated_vectors(num_vectors: int = 400, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(DIM, DIM))
    return (generator.normal(size=(num_vectors, DIM)) @ mixing + 2).astype(np.float32)


def moments_of(vectors: np.ndarray) -> VectorMoments:
    moments = VectorMoments(vectors.shape[1])
    for part in np.array_split(vectors, 7):
        moments.add(part)
    return moments


def fitted_pca(vectors: np.ndarray, **settings: object) -> Whitening:
    moments = moments_of(vectors)
    return pca_whitening(moments.mean, moments.covariance, WhiteningSettings(**settings), fitted_on={})


def matching_pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of classes, and the two rows of each pair; within a class they scatter along a few directions most."""
    generator = np.random.default_rng(3)
    scatter = np.diag([3.0, 1.0, 0.5, 0.2, 0.1, 0.1]) @ np.linalg.qr(generator.normal(size=(DIM, DIM)))[0]
    centres = generator.normal(size=(60, DIM))
    vectors = np.repeat(centres, 4, axis=0) + generator.normal(size=(240, DIM)) @ scatter
    left, right = np.arange(0, 240, 2), np.arange(1, 240, 2)
    return vectors.astype(np.float32), left, right


def fitted_to_pairs(vectors: np.ndarray, left: np.ndarray, right: np.ndarray, **settings: object) -> Whitening:
    moments = moments_of(vectors)
    differences = (vectors[left] - vectors[right]).astype(np.float64)
    pair_covariance = differences.T @ differences / len(left)
    chosen = WhiteningSettings(method="learned", **settings)
    return learned_whitening(moments.mean, moments.covariance, pair_covariance, chosen, fitted_on={})


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def same_up_to_signs(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """`found` with the columns turned as those of `expected`."""
    return found * np.sign((found * expected).sum(axis=0))


def test_moments_of_blocks_are_those_of_all_vectors() -> None:
    vectors = correlated_vectors()
    moments = moments_of(vectors)
    assert moments.num_vectors == len(vectors)
    np.testing.assert_allclose(moments.mean, vectors.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(vectors.T.astype(np.float64), bias=True), rtol=1e-9)


@pytest.mark.parametrize(("dim", "power"), [(None, 0.5), (3, 0.5), (DIM, 0.25)])
def test_pca_whitening_equals_its_slow_twin(dim: int | None, power: float) -> None:
    vectors = correlated_vectors().astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    # By singular values of the vectors themselves: no covariance is formed.
    _, singular_values, directions = np.linalg.svd(centred, full_matrices=False)
    variances = singular_values**2 / len(vectors)
    expected = unit((centred @ directions.T / variances**power)[:, :dim])
    found = fitted_pca(correlated_vectors(), dim=dim, power=power)(torch.from_numpy(correlated_vectors())).numpy()
    np.testing.assert_allclose(same_up_to_signs(found, expected), expected, atol=2e-5)


@pytest.mark.parametrize("dim", [None, 2])
def test_whitened_vectors_have_identity_covariance_and_zero_mean(dim: int | None) -> None:
    whitening = fitted_pca(correlated_vectors(), dim=dim)
    projected = (correlated_vectors() - whitening.mean.numpy()) @ whitening.projection.numpy()
    np.testing.assert_allclose(np.cov(projected.T, bias=True), np.eye(dim or DIM), atol=1e-4)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-5)


def test_shrinkage_divides_by_variances_drawn_to_their_mean() -> None:
    gamma, covariance = 0.3, moments_of(correlated_vectors()).covariance
    shrunk = (1 - gamma) * covariance + gamma * np.trace(covariance) / DIM * np.eye(DIM)
    projection = fitted_pca(correlated_vectors(), shrinkage=gamma).projection.numpy().astype(np.float64)
    np.testing.assert_allclose(projection.T @ shrunk @ projection, np.eye(DIM), atol=1e-5)


def test_learned_whitening_equals_its_slow_twin() -> None:
    """The twin whitens by a Cholesky factor and turns by the eigenvectors of the outer product of all vectors."""
    vectors, left, right = matching_pairs()
    exact = vectors.astype(np.float64)
    pair_covariance = sum(np.outer(exact[i] - exact[j], exact[i] - exact[j]) for i, j in zip(left, right, strict=True))
    whitener = np.linalg.inv(np.linalg.cholesky(pair_covariance / len(left)))
    centred = (exact - exact.mean(axis=0)) @ whitener.T
    values, rotation = np.linalg.eig(centred.T @ centred)
    expected = unit(centred @ rotation[:, np.argsort(-values)[:4]])
    found = fitted_to_pairs(vectors, left, right, dim=4)(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(same_up_to_signs(found, expected), expected, atol=5e-5)


def test_learned_whitening_draws_pairs_together_and_makes_them_differ_alike() -> None:
    vectors, left, right = matching_pairs()
    whitening = fitted_to_pairs(vectors, left, right)
    projected = (vectors - whitening.mean.numpy()) @ whitening.projection.numpy()
    differences = projected[left] - projected[right]
    np.testing.assert_allclose(differences.T @ differences / len(left), np.eye(DIM), atol=1e-3)
    after = whitening(torch.from_numpy(vectors)).numpy()
    others = np.roll(right, 17)

    def closeness_of_pairs(rows: np.ndarray) -> float:
        pairs = np.linalg.norm(rows[left] - rows[right], axis=1).mean()
        return float(np.linalg.norm(rows[left] - rows[others], axis=1).mean() / pairs)

    assert closeness_of_pairs(after) > 1.3 * closeness_of_pairs(unit(vectors))


def test_a_feature_that_is_always_zero_changes_nothing() -> None:
    vectors, left, right = matching_pairs()
    expected = fitted_to_pairs(vectors, left, right)(torch.from_numpy(vectors)).numpy()
    with_zero = np.insert(vectors, 2, 0, axis=1)
    found = fitted_to_pairs(with_zero, left, right)(torch.from_numpy(with_zero)).numpy()
    np.testing.assert_allclose(same_up_to_signs(found, expected), expected, atol=1e-5)


def test_what_the_vectors_do_not_determine_is_refused() -> None:
    flat = correlated_vectors()
    flat[:, 4:] = 0.5
    assert fitted_pca(flat).dim == 4
    with pytest.raises(DataError, match="vary in 4 directions only, so 5 cannot be kept"):
        fitted_pca(flat, dim=5)
    with pytest.raises(SettingsError, match="dim is 7, the vectors have 6"):
        fitted_pca(flat, dim=7)
    with pytest.raises(DataError, match="vary in 0 directions"):
        fitted_pca(np.ones((10, DIM), np.float32))
    left, right = np.arange(3), np.arange(3, 6)
    with pytest.raises(DataError, match=r"differ in 3 of the 6 directions.*shrinkage above 0"):
        fitted_to_pairs(correlated_vectors(), left, right)
    assert fitted_to_pairs(correlated_vectors(), left, right, shrinkage=0.1).dim == DIM
    with pytest.raises(DataError, match="differ in 0 of the 6"):
        fitted_to_pairs(correlated_vectors(), left, left, shrinkage=0.1)


def test_the_map_does_not_depend_on_the_sign_of_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fitted_pca(correlated_vectors())
    original = np.linalg.eigh

    def other_library(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = original(matrix)
        return values, vectors * np.array([1, -1, -1, 1, -1, 1])

    monkeypatch.setattr(np.linalg, "eigh", other_library)
    assert fitted_pca(correlated_vectors()).fingerprint == expected.fingerprint


def test_the_result_does_not_depend_on_company() -> None:
    generator = np.random.default_rng(0)
    vectors = torch.from_numpy(unit(generator.normal(size=(300, 512))).astype(np.float32))
    whitening = fitted_pca(vectors.numpy(), dim=100)
    alone = torch.cat([whitening(vectors[row : row + 1]) for row in range(300)])
    assert torch.equal(whitening(vectors), alone)


def test_a_zero_vector_stays_zero() -> None:
    vectors = torch.zeros(2, DIM)
    vectors[1, 0] = 1
    whitened = fitted_pca(correlated_vectors())(vectors)
    assert whitened[0].tolist() == [0] * DIM
    assert float(whitened[1].norm()) == pytest.approx(1)


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_an_encoder_keeps_its_whitening_and_is_another_encoder_with_it(tmp_path: Path) -> None:
    encoder = create_encoder(SMALL)
    plain = embed_pixels(encoder, pixels())
    plain_fingerprint, plain_manifest = encoder.fingerprint, save_encoder(encoder, tmp_path / "plain")
    encoder.whitening = fitted_pca(plain.numpy(), dim=3)
    manifest = save_encoder(encoder, tmp_path / "whitened")
    loaded = load_encoder(tmp_path / "whitened")
    assert loaded.dim == encoder.dim == manifest.details["dim"] == 3
    assert loaded.fingerprint == encoder.fingerprint == manifest.details["encoder_fingerprint"] != plain_fingerprint
    assert torch.equal(embed_pixels(loaded, pixels()), encoder.whitening(plain))
    assert loaded.whitening is not None
    assert loaded.whitening.settings == encoder.whitening.settings
    # Programs that know no whitening read the one and refuse the other.
    assert (plain_manifest.format_version, manifest.format_version) == (1, 2)
    assert load_encoder(tmp_path / "plain").fingerprint == plain_fingerprint
    with pytest.raises(SettingsError, match="fitted to vectors of its own"):
        with_input(encoder, ["scales=[1, 0.5]"])
    encoder.whitening = None
    assert encoder.fingerprint == plain_fingerprint


def test_a_damaged_or_foreign_whitening_is_refused(tmp_path: Path) -> None:
    encoder = create_encoder(SMALL)
    encoder.whitening = fitted_pca(correlated_vectors())
    save_encoder(encoder, tmp_path / "e")
    (tmp_path / "e" / "whitening.safetensors").write_bytes(b"garbage")
    with pytest.raises(ChecksumMismatch, match=r"whitening\.safetensors"):
        load_encoder(tmp_path / "e")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Whitening.read(tmp_path / "e")
    other = create_encoder(SMALL.model_copy(update={"projection_dim": 5}))
    other.whitening = encoder.whitening
    save_encoder(other, tmp_path / "other")
    with pytest.raises(ArtifactError, match="takes 6 numbers, the network gives 5"):
        load_encoder(tmp_path / "other")
