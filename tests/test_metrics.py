import numpy as np
import pytest
import torch

from diffusers_onestep.features import FashionCNN
from diffusers_onestep.metrics import (
    agreement,
    bootstrap_error,
    density_coverage,
    diversity,
    frechet_distance,
    frechet_distance_of_moments,
    inception_score,
    kernel_distance,
    kernel_distance_error,
    moments,
    precision_recall,
    retrieval_points,
)
from diffusers_onestep.reference import Reference


def test_frechet_distance_of_gaussians_with_diagonal_covariances():
    mean_a, mean_b = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 4.0]).double()
    std_a, std_b = torch.tensor([0.5, 2.0]).double(), torch.tensor([1.5, 1.0]).double()
    expected = 1.0 + 4.0 + 1.0 + 1.0
    got = frechet_distance_of_moments(mean_a, torch.diag(std_a**2), mean_b, torch.diag(std_b**2))
    assert got == pytest.approx(expected)


def test_frechet_distance_is_symmetric_zero_at_equality_and_takes_arrays():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(500, 6)), generator.normal(0.3, 1.2, size=(400, 6))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(torch.from_numpy(b), torch.from_numpy(a)))
    assert moments(a)[1].numpy() == pytest.approx(np.cov(a.T))


def test_rank_deficient_features_are_fine():
    a = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_kernel_distance_is_the_mean_over_pairs_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator).double(), torch.randn(4, 3, generator=generator).double() + 1

    def kernel(x, y):
        return ((x @ y).item() / 3 + 1) ** 3

    same_a = [kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j]
    same_b = [kernel(b[i], b[j]) for i in range(4) for j in range(4) if i != j]
    cross = [kernel(x, y) for x in a for y in b]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert kernel_distance(a, b) == pytest.approx(mean(same_a) + mean(same_b) - 2 * mean(cross))
    draws = [kernel_distance(*torch.randn(2, 20, 3, generator=generator)) for _ in range(400)]
    assert abs(mean(draws)) < 0.1


def test_precision_and_recall_of_known_sets():
    line = torch.arange(20.0)[:, None]
    assert precision_recall(line, line) == (1.0, 1.0)
    assert precision_recall(line, line + 100) == (0.0, 0.0)
    half = torch.cat([line[:10], line[:10] + 0.1])  # all within the real ones, but covering only half of them
    precision, recall = precision_recall(line, half)
    assert precision == 1.0 and recall == 11 / 20  # the eleventh lies in the ball of the tenth


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"`features` must be \(N, D\)"):
        moments(torch.zeros(1, 3))


def test_fashion_network_and_its_reference():
    network = FashionCNN.from_shipped()
    pixels = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    features, logits = network(pixels, batch_size=3)
    assert features.shape == (4, 128) and logits.shape == (4, 10)
    torch.testing.assert_close(network(pixels[2:3])[0], features[2:3])
    reference = Reference.load(None, network)
    assert reference.mean.shape == (128,) and reference.covariance.shape == (128, 128)
    assert reference.mean.dtype == torch.float64 and reference.features.shape == (10_000, 128)
    with pytest.raises(ValueError, match=r"`pixels` must be uint8"):
        network(pixels.float())


def test_density_and_coverage_of_equal_and_of_far_samples():
    generator = torch.Generator().manual_seed(0)
    real, same = torch.randn(2, 1500, 4, generator=generator)
    density, coverage = density_coverage(real, same)
    assert density == pytest.approx(1, abs=0.06) and coverage == pytest.approx(1 - 0.5**5, abs=0.02)
    assert density_coverage(real, same + 50) == (0.0, 0.0)
    one_place = real[:1] + 1e-3 * same
    assert density_coverage(real, one_place)[0] > 0.5 and density_coverage(real, one_place)[1] < 0.05


def test_inception_score_by_hand():
    assert inception_score(torch.eye(10).repeat(20, 1), splits=1)[0] == pytest.approx(10)
    assert inception_score(torch.full((200, 10), 0.1)) == pytest.approx((1, 0), abs=1e-9)
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).double()
    marginal = p.mean(0)
    expected = (p * (p / marginal).log()).sum(1).mean().exp()
    assert inception_score(p, splits=1)[0] == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="`probabilities` must sum to 1"):
        inception_score(torch.randn(20, 10))


def test_diversity_and_agreement():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    pairs = [(a - b).norm() for i, a in enumerate(x[:20]) for j, b in enumerate(x[:20]) if i != j]
    assert diversity(x[:20]) == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    assert agreement(x, x) == pytest.approx(1, abs=1e-5) and agreement(x, x.roll(1, 0)) == pytest.approx(0, abs=0.05)
    assert 0.5 < agreement(x, x + 0.3 * x.roll(1, 0)) < 0.9
    labels = torch.arange(300) % 3
    shifted = x + 100 * labels[:, None]
    assert agreement(shifted, shifted.roll(3, 0)) > 0.9  # the same labels
    assert agreement(shifted, shifted.roll(3, 0), labels) == pytest.approx(0, abs=0.05)
    with pytest.raises(ValueError, match="`a` and `b` must be of the same noises"):
        agreement(x, x[:5])


def test_bootstrap_error_is_the_standard_error_of_a_mean():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    assert bootstrap_error(lambda v: v.mean().item(), x, 200) == pytest.approx(2000**-0.5, rel=0.15)


def test_the_digest_names_the_weights():
    network = FashionCNN.from_shipped()
    before = network.digest()
    assert before == FashionCNN.from_shipped().digest() and len(before) == 16
    network.fc.bias.data[0] += 1
    assert network.digest() != before


def test_retrieval_of_features_whose_neighbours_are_known():
    real, captions = torch.eye(6), ["cat", "cat", "dog", "sun", "sea", "sky"]
    features = torch.tensor([[0.1, 9, 5, 0, 0, 0], [0, 0, 1, 2, 3, 4.0], [0, 0, 0, 0, 0, 1], [1.0, 0, 0, 0, 0, 0]])
    prompts = ["cat", "dog", "nobody's", "cat"]
    assert retrieval_points(features, prompts, real, captions, k=1).tolist() == [1, 0, 0, 1]
    assert retrieval_points(features, prompts, real, captions, k=3).tolist() == [1, 0, 0, 1]
    assert retrieval_points(features, prompts, real, captions, k=4).tolist() == [1, 1, 0, 1]
    with pytest.raises(ValueError, match=r"`k` must be at most the number of real images \(6\), but is 7"):
        retrieval_points(features, prompts, real, captions, k=7)
    with pytest.raises(ValueError, match=r"`prompts` and `captions` must be one per image \(4, 6\), but are 3, 6"):
        retrieval_points(features, prompts[:3], real, captions)


def test_errors_do_not_depend_on_how_images_are_sorted():
    generator = torch.Generator().manual_seed(0)
    real, same = torch.randn(2, 2000, 4, generator=generator)
    ascending, descending = same[same[:, 0].argsort()], real[real[:, 0].argsort(descending=True)]
    assert kernel_distance_error(ascending, descending) < 5 * kernel_distance_error(same, real) < 0.1


def test_a_saved_reference_keeps_features_of_all_kinds(tmp_path):
    network = FashionCNN.from_shipped()
    features = torch.arange(1000.0)[:, None].expand(-1, 128)
    Reference(*moments(features), features).save(tmp_path / "r.safetensors", features=100)
    kept = Reference.load(tmp_path / "r.safetensors", network).features[:, 0]
    assert len(kept.unique()) == 100 and 400 < kept.mean() < 600
