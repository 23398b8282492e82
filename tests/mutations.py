"""What the fuzzers of readers do to good values, lines and files, as a source of chance decides.

The source is a `random.Random`, or hypothesis's `st.randoms(use_true_random=False)`, which finds the smallest failure.
"""

import json
import math
import struct

from tests.data.rows.test_layouts import assistant, user

WORDS = [
    "",
    " ",
    "\0",
    "\ud800",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "\n\nHuman:",
    "\n\nAssistant: x",
    "é\u2028",
    "q",
]
JUNK = [
    [None],
    [True, False],
    [0, -1, 2, 10**400, 1e39, math.nan, math.inf, -0.0, [], {}, [[]], [None], {"role": "user"}],
    WORDS,
    [[], {}, [3], {"x": 3}],
    [[user("Q")], [assistant("A")], [user("Q"), assistant("A")], assistant(3), {"role": ["user"]}],
]
"""Values of each kind, all kinds as likely."""
NUMBERS = [0, 1, 2, 3, 7, 8, 9, 12, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


def copied(value):
    """A copy that shares no list or object with a JSON value."""
    return json.loads(json.dumps(value))


def places_of(value, path=()):
    """Every place inside a JSON value, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_of(item, (*path, key))


def parent_of(value, path):
    """The list or object that holds a place."""
    for key in path[:-1]:
        value = value[key]
    return value


def draw_character(chance):
    """Any character but a surrogate, as often ASCII as of the first plane or of all."""
    number = chance.randrange(chance.choice([0x80, 0xD800, 0x110000]))
    return chr(number if not 0xD800 <= number < 0xE000 else number - 0x800)


def draw_junk(chance, *more):
    """A value of one of the kinds of `JUNK`, of `more` kinds, or a text of words or of any characters."""
    kinds = [*JUNK, *more]
    kind = chance.randrange(len(kinds) + 2)
    if kind < len(kinds):
        return copied(chance.choice(kinds[kind]))
    if kind == len(kinds):
        return "".join(chance.choice(WORDS) for _ in range(chance.randrange(5)))
    return "".join(draw_character(chance) for _ in range(chance.randrange(6)))


def mutate_values(chance, values):
    """A JSON value with one to three places replaced by junk."""
    values = copied(values)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(list(places_of(values)))
        junk = draw_junk(chance, [*NUMBERS, -(2**63), 1e308, "BF16"])
        if not path:
            return junk
        parent_of(values, path)[path[-1]] = junk
    return values


def mutate_line(chance, rows):
    """A line with one of the rows, mutated as a value up to three times, then sometimes as bytes."""
    row = copied(chance.choice(rows))
    for _ in range(chance.randint(0, 3)):
        path = chance.choice(list(places_of(row)))
        junk = draw_junk(chance)
        if not path:
            row = junk
            continue
        parent = parent_of(row, path)
        if chance.randrange(2):
            parent[path[-1]] = junk
        elif isinstance(parent, list) and chance.randrange(2):
            parent.append(parent[path[-1]])
        else:
            del parent[path[-1]]
    line = json.dumps(row, ensure_ascii=bool(chance.randrange(2))).encode("utf-8", "surrogatepass")
    if chance.randrange(5) == 0:
        at = chance.randint(0, len(line))
        line = line[:at] + chance.randbytes(chance.randint(0, 3)) + line[at + chance.randint(0, 3) :]
    return line


def mutate_bytes(chance, whole, head):
    """A file with a few bytes or numbers changed, cut out or repeated, mostly in its first `head` bytes."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 3)):
        at = chance.randint(0, min(head if chance.randrange(8) else len(data), len(data)))
        match chance.randrange(6):
            case 0:
                data[at : at + 1] = chance.randbytes(1)
            case 1:
                data[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS) & 0xFFFFFFFF)
            case 2:
                data[at : at + 8] = struct.pack("<Q", chance.choice(NUMBERS))
            case 3:
                del data[at : at + chance.choice([1, 4, 8, 64, max(len(data), 1)])]
            case 4:
                data[at:at] = chance.randbytes(chance.randint(0, 8))
            case 5:
                data[at:at] = data[at : at + 32]
    return bytes(data)
