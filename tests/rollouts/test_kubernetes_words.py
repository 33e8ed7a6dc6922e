"""Flags of a command line change in whatever spelling they stand, and nothing else does; weights add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings
from resources.rollouts.targets import TargetError
from resources.rollouts.targets.kubernetes.command import refuse_shell, with_flags
from resources.rollouts.targets.kubernetes.objects import candidate_labels
from resources.rollouts.targets.kubernetes.route import original_weights, percent_of, with_share

SETTINGS = KubernetesSettings(namespace="llm", deployment="chat", route="chat", backend="chat")


@pytest.mark.parametrize(
    ("before", "flags", "after"),
    [
        ("--max-num-seqs 64 --port 8000", {"max_num_seqs": "128"}, "--max-num-seqs=128 --port 8000"),
        ("--max_num_seqs=64 --port 8000", {"max-num-seqs": "128"}, "--max-num-seqs=128 --port 8000"),
        ("serve tiny --a 1", {"max_num_seqs": "128"}, "serve tiny --a 1 --max-num-seqs=128"),
        ("--max-num-seqs 64 --a 1", {"max_num_seqs": None}, "--a 1"),
        ("--max-num-seqs=64", {"max_num_seqs": None}, ""),
        ("--enable-prefix-caching --a 1", {"enable_prefix_caching": None}, "--a 1"),
        ("--a 1 --no-enable-prefix-caching", {"enable_prefix_caching": ""}, "--a 1 --enable-prefix-caching"),
        ("--enable-prefix-caching", {"no_enable_prefix_caching": ""}, "--no-enable-prefix-caching"),
        ("--max-num-seqs 64 --max-num-seqs=32", {"max_num_seqs": "8"}, "--max-num-seqs=8"),
        ("--nice -5 --a 1", {"nice": "3"}, "--nice=3 --a 1"),
        ("--max-num-seqs-more 64", {"max_num_seqs": "8"}, "--max-num-seqs-more 64 --max-num-seqs=8"),
    ],
)
def test_a_flag_is_replaced_where_it_stands(before: str, flags: dict[str, str | None], after: str) -> None:
    assert with_flags(before.split(), flags) == after.split()


def test_a_word_that_may_be_anybodys_is_not_guessed_at() -> None:
    """`--enable-x tiny`: a value, or the model that follows? Somebody who knows writes it clearly."""
    with pytest.raises(TargetError, match="not clear whether 'tiny' belongs to --enable-prefix-caching"):
        with_flags(["--enable-prefix-caching", "tiny"], {"enable_prefix_caching": None})


@pytest.mark.parametrize("words", [["sh", "-c", "vllm serve"], ["/bin/bash", "-ec", "x"], ["env", "sh", "-c", "x"]])
def test_a_shell_script_is_refused(words: list[str]) -> None:
    with pytest.raises(TargetError, match="runs a shell script"):
        refuse_shell(words, "Deployment llm/chat")


NAMES = st.from_regex(r"[a-z]{3,5}(_[a-z]{2,4})?", fullmatch=True).filter(lambda name: not name.startswith("no_"))
FLAGS = st.dictionaries(NAMES, st.one_of(st.none(), st.from_regex(r"[a-z0-9]{1,4}", fullmatch=True)), max_size=4)


@given(before=FLAGS, flags=FLAGS)
def test_flags_end_as_told_once_and_all_others_stay(
    before: dict[str, str | None], flags: dict[str, str | None]
) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in before.items() if value is not None]

    changed = with_flags(words, flags)

    wanted = {name: value for name, value in {**before, **flags}.items() if value is not None}
    assert sorted(changed) == sorted(f"--{name.replace('_', '-')}={value}" for name, value in wanted.items())
    assert with_flags(changed, flags) == changed


WEIGHTS = st.one_of(st.none(), st.integers(1, 1000))


@given(stable=WEIGHTS, other=WEIGHTS, percents=st.lists(st.floats(1, 100), min_size=1, max_size=4))
def test_any_walk_of_shares_ends_where_it_began(stable: int | None, other: int | None, percents: list[float]) -> None:
    def ref(name: str, weight: int | None) -> dict[str, object]:
        return {"name": name} if weight is None else {"name": name, "weight": weight}

    rules = [{"backendRefs": [ref("chat", stable), ref("other", other)]}]
    original = original_weights(rules, SETTINGS)
    walked = rules
    for percent in percents:
        walked = with_share(walked, SETTINGS, percent, original)
        weights = {str(one["name"]): int(one["weight"]) for one in walked[0]["backendRefs"]}
        assert abs(percent_of(walked, SETTINGS) - percent) < 0.1
        assert all(0 <= weight <= 1_000_000 for weight in weights.values())
        ours = weights["chat"] + weights["chat-candidate"]
        assert ours * (other or 1) == weights["other"] * (stable or 1)
    back = with_share(walked, SETTINGS, 0.0, original)

    assert percent_of(back, SETTINGS) == 0
    [kept] = [[one for one in rule["backendRefs"] if one["name"] != "chat-candidate"] for rule in back]
    assert kept == rules[0]["backendRefs"]


@given(
    labels=st.dictionaries(NAMES, NAMES, min_size=1, max_size=4),
    first=st.integers(0, 10),
    second=st.integers(0, 10),
)
def test_no_selector_of_the_stable_pods_chooses_a_candidate(labels: dict[str, str], first: int, second: int) -> None:
    keys = sorted(labels)
    selectors = [{key: labels[key] for key in keys[: 1 + cut % len(keys)]} for cut in (first, second)]
    deployment = {"metadata": {"name": "chat"}, "spec": {"template": {"metadata": {"labels": labels}}}}

    made = candidate_labels(deployment, *selectors)

    assert all(any(made.get(key) != value for key, value in one.items()) for one in selectors)
    assert sum(made[key] != labels[key] for key in labels) == 1
