"""R8: same call, same key; different calls, different keys; everywhere and for ever."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import traceback
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kombu.serialization import dumps, loads
from kombu.utils.json import register_type

import golden_calls
from celery_singleton_lock.errors import ConfigurationError, KeyDerivationError
from celery_singleton_lock.keys import BUCKETS, call_digest, check_key_prefix
from golden_calls import Colour, Level, Size, decrement, every_kind, f, key, of_value

GOLDEN = Path(__file__).with_name("golden_keys.json")


def through(serializer: str, value: Any) -> Any:
    """What the worker gets of what the client sends."""
    content_type, encoding, body = dumps(value, serializer)
    return loads(body, content_type, encoding, accept=[content_type])


# What Celery can send -------------------------------------------------------------------------

offsets = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(
    lambda delta: timezone(timedelta(seconds=int(delta.total_seconds())))
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.datetimes(timezones=st.none() | offsets),
    st.dates(),
    st.times(),
    st.uuids(),
    st.decimals(allow_nan=False),
    st.sampled_from([Size.SMALL, Level.LOW]),
)
json_keys = st.one_of(
    st.text(), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False)
)
json_values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(json_keys, inner, max_size=4),
    ),
    max_leaves=12,
)
pickle_values = st.recursive(
    leaves
    | st.timedeltas()
    | st.sampled_from(Colour)
    | st.frozensets(st.integers() | st.text())
    | st.sets(st.integers() | st.text()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


# Same call, same key --------------------------------------------------------------------------


@given(
    st.tuples(json_values, json_values, json_values, json_values, json_values),
    st.dictionaries(st.sampled_from(["x", "y", "a"]), json_values),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_all_spellings_of_one_call_have_one_key(values, rest, omit_defaults, random):
    a, b, c, d, e = values
    if omit_defaults:
        c, e = 3, "five"
    spelled_out = key(every_kind, a, b, c, d=d, e=e, **rest)

    by_name = {"b": b, "c": c, "d": d, "e": e, **rest}
    if omit_defaults:
        del by_name["c"], by_name["e"]
    shuffled = list(by_name.items())
    random.shuffle(shuffled)

    assert key(every_kind, a, **dict(shuffled)) == spelled_out


@given(json_values)
def test_client_and_worker_compute_one_key_through_json(value):
    assert of_value(through("json", value)) == of_value(value)


@given(json_values | pickle_values)
def test_client_and_worker_compute_one_key_through_pickle(value):
    assert of_value(through("pickle", value)) == of_value(value)


def test_a_message_with_escaped_surrogates_keeps_its_key():
    # Given text that JSON joins on the way: two surrogates become one character
    apart = {"\ud83d\ude00": "\ud83d\ude00", "\uffff": 1}

    assert of_value(through("json", apart)) == of_value(apart)


def test_types_that_users_register_with_kombu_have_a_key():
    class Money:
        def __init__(self, cents: int) -> None:
            self.cents = cents

    register_type(Money, "money", lambda money: money.cents, Money)

    assert of_value(through("json", Money(5))) == of_value(Money(5)) != of_value(Money(6))
    assert of_value(Money(5)) != of_value({"cents": 5})


def test_a_type_that_users_register_is_never_taken_for_one_of_ours():
    class Lapse:
        """Its authors chose a marker that this package uses for timedelta."""

    register_type(Lapse, "timedelta", lambda lapse: [1, 0, 0], lambda _: Lapse())

    assert of_value(through("json", Lapse())) == of_value(Lapse())
    assert of_value(Lapse()) != of_value(timedelta(days=1))


def test_an_object_that_reduces_itself_for_json_has_the_key_of_what_is_sent():
    class Point:
        def __json__(self):
            return {"x": 1}

    assert of_value(Point()) == of_value(through("json", Point())) == of_value({"x": 1})


def test_a_mapping_that_json_turns_into_a_typed_value_has_that_values_key():
    looks_typed = {"__type__": "uuid", "__value__": {"hex": "0" * 32}}

    assert of_value(looks_typed) == of_value(through("json", looks_typed)) == of_value(UUID(int=0))


# Different calls, different keys --------------------------------------------------------------


def with_types(value: Any) -> Any:
    """A value that equals another only if their types agree too: Python says 1 == 1.0 == True."""
    if isinstance(value, list):
        return ("list", tuple(with_types(item) for item in value))
    if isinstance(value, dict):
        return ("dict", frozenset((with_types(k), with_types(v)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(with_types(item) for item in value))
    if isinstance(value, (float, Decimal, datetime, time)):  # -0.0 == 0.0, equal instants
        return (type(value), repr(value))
    if isinstance(value, (Size, Level)):  # these are what JSON makes of them
        return with_types(value.value)
    return (type(value), value)


def what_json_makes_of(value: Any) -> Any:
    """The worker's view of a value."""
    return with_types(through("json", value))


def near(value: Any) -> st.SearchStrategy[Any]:
    """Values that a careless key would take for ``value``."""
    others = [str(value), repr(value), [value], {"value": value}, (value, None), {str(value): None}]
    if isinstance(value, (int, float)) and value == value and abs(value) < 2**53:
        others += [int(value), float(value), bool(value), Decimal(int(value))]
    if isinstance(value, (list, tuple)):
        others += [list(reversed(value)), value[:-1], [str(item) for item in value]]
    if isinstance(value, dict):
        others += [list(value.items()), {str(k): str(v) for k, v in value.items()}]
    return st.sampled_from(others)


@given(
    st.one_of(
        st.tuples(json_values, json_values),
        json_values.flatmap(lambda value: st.tuples(st.just(value), near(value))),
    )
)
@example((1, "1"))
@example((None, "None"))
@example((True, 1))
@example((1, 1.0))
@example((0.0, -0.0))
@example((b"a", "a"))
@example((Decimal("1.0"), Decimal("1.00")))
@example((datetime(2026, 1, 1), "2026-01-01T00:00:00"))
@example((datetime(2026, 1, 1), date(2026, 1, 1)))
@example(((1, 2), [1, 2]))
@example(({1: "a"}, {"1": "a"}))
@example((Size.SMALL, "small"))
def test_two_values_share_a_key_exactly_when_json_merges_them(pair):
    one, other = pair

    assert (of_value(one) == of_value(other)) == (
        what_json_makes_of(one) == what_json_makes_of(other)
    )


@given(pickle_values, pickle_values)
@example({1}, frozenset({1}))
@example({1}, [1])
@example(Colour.RED, "red")
@example(Colour.RED, Colour.BLUE)
@example(timedelta(1), 86400)
def test_values_that_only_pickle_can_send_share_a_key_only_if_they_are_one(one, other):
    assert (of_value(one) == of_value(other)) == (with_types(one) == with_types(other))


def test_arguments_are_not_glued_together():
    assert key(f, "1_b-2") != key(f, "1", b=2)
    assert key(f, "1", "2") != key(f, "12")
    assert key(f, ["1", "2"]) != key(f, "1", "2")


def test_parameters_that_hold_each_others_values_do_not_meet():
    def takes_any(*args, **kwargs):
        """Everything lands in two parameters."""

    assert key(takes_any, 1) != key(takes_any, a=1) != key(takes_any, {"a": 1})
    assert key(takes_any, args=[1]) != key(takes_any, 1)


def test_lock_names_keep_equal_arguments_apart():
    assert key(f, 1, name="shop.buy") != key(f, 1, name="shop.sell")


def test_keys_spread_over_all_buckets():
    buckets = {key(f, number).split("{")[1].split("}")[0] for number in range(2000)}

    assert buckets == {str(bucket) for bucket in range(BUCKETS)}


def test_the_lock_name_stands_in_clear_and_the_arguments_do_not():
    made = key(f, "s3cret", name="shop.buy")

    assert ":1:shop.buy:" in made
    assert "s3cret" not in made


# Which arguments count ------------------------------------------------------------------------


def take(item):
    """Another task, which spells the same argument differently."""


def test_lock_args_leaves_the_others_out():
    assert key(decrement, 1, "anvil", lock_args=("sku",)) == key(
        decrement, 2, quantity=5, sku="anvil", lock_args=("sku",)
    )
    assert key(decrement, 1, "anvil", lock_args=("sku",)) != key(
        decrement, 1, "rope", lock_args=("sku",)
    )


def test_two_tasks_with_one_lock_name_may_name_the_argument_differently():
    one = key(decrement, 1, "anvil", lock_args=("sku",), name="inventory")
    other = key(take, "anvil", lock_args=("item",), name="inventory")

    assert one == other


def test_the_order_of_lock_args_counts():
    assert key(decrement, "a", "b", lock_args=("order_id", "sku")) != key(
        decrement, "a", "b", lock_args=("sku", "order_id")
    )


def test_a_callable_sees_the_arguments_with_defaults_and_may_return_several_values():
    by_callable = key(decrement, 1, sku="anvil", lock_args=lambda order, sku, n: (sku, n))

    assert by_callable == key(decrement, 1, "anvil", lock_args=("sku", "quantity"))
    assert key(decrement, 1, "anvil", lock_args=lambda order, sku, n: sku) == key(
        decrement, 1, "anvil", lock_args=("sku",)
    )


def test_lock_args_finds_names_among_keyword_arguments():
    def takes_any(**kwargs):
        """Everything is a keyword."""

    assert key(takes_any, sku="anvil", n=1, lock_args=("sku",)) == key(
        take, "anvil", lock_args=("item",)
    )
    with pytest.raises(KeyDerivationError, match="'sku' is named by lock_args"):
        key(takes_any, n=1, lock_args=("sku",))


def test_no_argument_counts_where_lock_args_is_empty():
    assert key(f, 1, lock_args=()) == key(f, 2, lock_args=())


# What has no key ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (object(), "builtins.object"),
        ({"deep": [object()]}, "builtins.object"),
        ({(1, 2): 3}, "key of type builtins.tuple"),
        ({"__type__": "no such", "__value__": 1}, "__type__"),
        (iter([1]), "list_iterator"),
        pytest.param(10**5000, "integer", id="huge integer"),
    ],
)
def test_what_has_no_canonical_form_is_named_by_its_argument(value, reason):
    with pytest.raises(KeyDerivationError, match=reason) as caught:
        key(f, 1, b=value)

    assert "b" in caught.value.argument.split(", ")
    assert "shop.buy" in str(caught.value)


def test_a_value_that_contains_itself_is_refused():
    endless: list[Any] = []
    endless.append(endless)

    with pytest.raises(KeyDerivationError, match="contains itself"):
        of_value(endless)


def test_a_callable_that_raises_is_named_without_the_values_that_it_quotes():
    def raising(a, b):
        raise ValueError(f"bad card {a}")

    card = "4111-1111"
    with pytest.raises(KeyDerivationError, match=r"lock_args.*ValueError at .*\.py:\d+") as caught:
        key(f, card, lock_args=raising)
    assert card not in "".join(traceback.format_exception(caught.value))


def test_arguments_that_do_not_fit_are_a_type_error_as_in_any_call():
    with pytest.raises(TypeError):
        key(f)


@pytest.mark.parametrize("prefix", ["my{app}:", "app{", "app}"])
def test_a_prefix_with_a_brace_is_refused(prefix):
    with pytest.raises(ConfigurationError, match="singleton_key_prefix"):
        check_key_prefix(prefix, "The setting singleton_key_prefix")


# Which call it is -------------------------------------------------------------------------------


def digest(*args, **kwargs):
    return call_digest("shop.buy", inspect.signature(f), args, kwargs)


def test_a_call_has_one_digest_however_it_is_spelt_and_others_have_others():
    spellings = {digest(1, 2), digest(1, b=2), digest(a=1, b=2)}

    assert len(spellings) == 1
    assert spellings.isdisjoint({digest(1, 3), digest(2, 2), digest(1, "2")})


def test_the_same_arguments_of_another_task_are_another_call():
    signature = inspect.signature(f)

    assert call_digest("shop.buy", signature, (1,), {}) != call_digest(
        "shop.sell", signature, (1,), {}
    )


def test_a_digest_tells_nothing_of_the_arguments():
    assert "4111-1111" not in digest("4111-1111")
    assert re.fullmatch("[0-9a-f]{40}", digest("4111-1111"))


# For ever -------------------------------------------------------------------------------------


def test_keys_are_what_they_were_in_the_first_release():
    assert golden_calls.golden() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("hash_seed", ["1", "424242"])
def test_keys_are_the_same_in_another_process_with_another_hash_seed(hash_seed):
    answer = subprocess.run(
        [sys.executable, golden_calls.__file__],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(answer.stdout) == json.loads(GOLDEN.read_text())
