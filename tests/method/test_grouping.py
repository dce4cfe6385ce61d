import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ream_stream.method.grouping import GROUPINGS, Evidence, centroids, hc_smoe, mc_smoe, ream

seeds = st.integers(0, 2**32 - 1)
names = pytest.mark.parametrize("name", GROUPINGS)


def on_a_line(positions, saliency):
    """Experts at points of a line in [0, 1], so that distances can be read off."""
    position_E = torch.tensor(positions, dtype=torch.float64)
    return Evidence(
        saliency_E=torch.tensor(saliency, dtype=torch.float64),
        distance_EE=(position_E[:, None] - position_E).abs(),
        mean_EH=position_E[:, None],
    )


@st.composite
def problems(draw, *, ties):
    """Evidence of N experts, how many to keep, and a group size that can hold them."""
    routing_groups = draw(st.sampled_from([1, 1, 2, 3]))
    size = draw(st.integers(1, 12 // routing_groups))
    num_experts = size * routing_groups
    keep = draw(st.integers(1, size)) * routing_groups
    smallest = -(-num_experts // keep)
    generator = torch.Generator().manual_seed(draw(seeds))

    def numbers(*shape):
        if ties:
            return torch.randint(0, 3, shape, generator=generator).double() / 4
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    distance_EE = numbers(num_experts, num_experts).triu(1)
    evidence = Evidence(
        saliency_E=numbers(num_experts),
        distance_EE=distance_EE + distance_EE.T,
        mean_EH=numbers(num_experts, 3),
    )
    counts = {
        "group_size": smallest + draw(st.integers(0, 2)),
        "routing_groups": routing_groups,
    }
    return evidence, keep, counts


def test_centroids_are_ranked_and_ties_go_to_the_lower_index():
    assert centroids(torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0]), 4) == [1, 2, 4, 0]
    assert centroids(torch.zeros(5), 3) == [0, 1, 2]


def test_each_routing_group_gives_its_own_best():
    saliency_E = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    assert centroids(saliency_E, 4, routing_groups=2) == [0, 1, 5, 4]


@pytest.mark.parametrize(
    ("keep", "routing_groups", "message"),
    [(0, 1, "cannot keep 0 of 6"), (7, 1, "cannot keep 7 of 6"), (3, 2, "into 2 groups")],
)
def test_counts_that_do_not_fit_are_refused(keep, routing_groups, message):
    with pytest.raises(ValueError, match=message):
        centroids(torch.rand(6), keep, routing_groups=routing_groups)


def test_an_odd_number_of_experts_does_not_divide_into_routing_groups():
    with pytest.raises(ValueError, match="5 experts, 2 kept"):
        centroids(torch.rand(5), 2, routing_groups=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_saliency_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match=r"saliency of experts \[2\]"):
        centroids(torch.tensor([1.0, 2.0, bad, 3.0]), 2)


def test_evidence_that_is_missing_or_not_finite_is_refused():
    saliency_E = torch.rand(3)
    with pytest.raises(ValueError, match="distance"):
        ream(Evidence(saliency_E=saliency_E), 2, group_size=4)
    with pytest.raises(ValueError, match="mean output"):
        hc_smoe(Evidence(saliency_E=saliency_E), 2)
    with pytest.raises(ValueError, match="distance of experts"):
        mc_smoe(Evidence(saliency_E=saliency_E, distance_EE=torch.full((3, 3), torch.nan)), 2)


def test_the_most_salient_centroid_fills_its_group_first():
    # expert 4 is nearer to 3 than to 0, but 0 is more salient and chooses first
    evidence = on_a_line([0.0, 0.1, 0.2, 0.7, 0.5], [9, 1, 2, 8, 3])
    assert ream(evidence, 2, group_size=3) == [[0, 1, 2], [3, 4]]
    assert ream(evidence, 2, group_size=4) == [[0, 1, 2, 4], [3]]
    assert mc_smoe(evidence, 2) == [[0, 1, 2], [3, 4]]


def test_members_are_in_the_order_they_were_absorbed():
    evidence = on_a_line([0.0, 0.3, 0.1, 0.2], [9, 1, 1, 1])
    assert ream(evidence, 1, group_size=4) == [[0, 2, 3, 1]]
    assert mc_smoe(evidence, 1) == [[0, 1, 2, 3]]


def test_ties_in_distance_go_to_the_lower_index_or_the_more_salient_centroid():
    evidence = on_a_line([0.5, 0.25, 0.75, 0.0, 1.0], [9, 0, 0, 1, 2])
    assert ream(evidence, 3, group_size=2) == [[0, 1], [3], [4, 2]]
    evidence = on_a_line([0.0, 0.5, 1.0], [1, 0, 2])
    assert mc_smoe(evidence, 2) == [[0], [2, 1]]


def test_groups_too_small_to_hold_all_experts_are_refused():
    evidence = on_a_line([0.0, 0.2, 0.4, 0.6, 0.8], [5, 4, 3, 2, 1])
    with pytest.raises(ValueError, match="2 groups of at most 2 cannot hold 5"):
        ream(evidence, 2, group_size=2)


def test_clusters_by_average_linkage_and_their_nearest_member():
    # {0, 2, 3} has its mean at 0.1, where 3 is; {1, 4} at 0.85
    evidence = on_a_line([0.0, 0.8, 0.2, 0.1, 0.9], [9, 1, 1, 1, 2])
    assert hc_smoe(evidence, 2) == [[3, 0, 2], [4, 1]]


def test_a_chain_of_near_neighbors_is_not_one_cluster():
    # the widest gap, before 0.83, is where single linkage would cut
    evidence = on_a_line([0.0, 0.19, 0.40, 0.60, 0.83], [2, 1, 1, 1, 1])
    assert hc_smoe(evidence, 2) == [[0, 1], [3, 2, 4]]


@pytest.mark.parametrize("nudge", [-1e-15, 0, 1e-15])
def test_of_two_equidistant_members_the_more_salient_leads_whatever_the_rounding(nudge):
    mean_EH = torch.tensor([[0.1, 0.7], [0.3, 0.9 + nudge], [9, 9]], dtype=torch.float64)
    for saliency, groups in (
        ([1, 2, 3], [[1, 0], [2]]),
        ([2, 1, 3], [[0, 1], [2]]),
        ([1, 1, 3], [[0, 1], [2]]),
    ):
        evidence = Evidence(saliency_E=torch.tensor(saliency), mean_EH=mean_EH)
        assert hc_smoe(evidence, 2) == groups


@given(seeds, st.sampled_from([1e-3, 1e-7]))
def test_pairs_of_long_vectors_are_led_by_the_more_salient(seed, apart):
    generator = torch.Generator().manual_seed(seed)
    mean_H = torch.randn(512, generator=generator, dtype=torch.float64)
    other_H = mean_H + apart * torch.randn(512, generator=generator, dtype=torch.float64)
    for saliency, group in (([1, 2], [1, 0]), ([2, 1], [0, 1])):
        evidence = Evidence(
            saliency_E=torch.tensor(saliency), mean_EH=torch.stack([mean_H, other_H])
        )
        assert hc_smoe(evidence, 1) == [group]


def test_pruning_drops_what_is_not_kept():
    evidence = Evidence(saliency_E=torch.tensor([1.0, 5.0, 3.0, 2.0]))
    assert GROUPINGS["none"](evidence, 2, group_size=16, routing_groups=1) == [[1], [2]]


@names
@given(problems(ties=False) | problems(ties=True))
def test_groups_are_a_partition_with_the_right_counts(name, problem):
    evidence, keep, counts = problem
    groups = GROUPINGS[name](evidence, keep, **counts)
    num_experts = len(evidence.saliency_E)
    assert len(groups) == keep
    assert groups == sorted(groups)
    members = sorted(itertools.chain(*groups))
    if name == "none":
        assert max(map(len, groups)) == 1
    else:
        assert members == list(range(num_experts))
    if name == "ream":
        assert max(map(len, groups)) <= counts["group_size"]
    per_group = num_experts // counts["routing_groups"]
    leaders = [group[0] // per_group for group in groups]
    assert {leaders.count(g) for g in leaders} == {keep // counts["routing_groups"]}
    if name != "hc-smoe":
        want = centroids(evidence.saliency_E, keep, routing_groups=counts["routing_groups"])
        assert [group[0] for group in groups] == sorted(want)


@names
@given(problems(ties=False), st.randoms(use_true_random=False))
def test_without_ties_the_names_of_experts_do_not_matter(name, problem, random):
    evidence, keep, counts = problem
    num_experts = len(evidence.saliency_E)
    renamed = list(range(num_experts))
    if counts["routing_groups"] == 1:  # otherwise the place of an expert means something
        random.shuffle(renamed)
    old_E = torch.tensor(renamed)
    groups = GROUPINGS[name](evidence, keep, **counts)
    again = GROUPINGS[name](
        Evidence(
            saliency_E=evidence.saliency_E[old_E],
            distance_EE=evidence.distance_EE[old_E][:, old_E],
            mean_EH=evidence.mean_EH[old_E],
        ),
        keep,
        **counts,
    )
    back = [[renamed[expert] for expert in group] for group in again]
    assert {g[0]: set(g) for g in back} == {g[0]: set(g) for g in groups}


@given(problems(ties=True))
def test_reams_groups_can_be_checked_expert_by_expert(problem):
    """Each group holds what is nearest among what no more salient centroid took."""
    evidence, keep, counts = problem
    by_centroid = {group[0]: group for group in ream(evidence, keep, **counts)}
    chosen = centroids(evidence.saliency_E, keep, routing_groups=counts["routing_groups"])
    free = set(range(len(evidence.saliency_E))) - set(chosen)
    for centroid in chosen:
        members = by_centroid[centroid][1:]
        far = evidence.distance_EE[centroid].tolist()
        assert members == sorted(free, key=lambda j: (far[j], j))[: counts["group_size"] - 1]
        free -= set(members)
    assert not free
