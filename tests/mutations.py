"""Damaged files out of good ones: what disks, transfers, editors, other programs and hostile people make of them.

Everything is drawn from the `random.Random` that is handed in, so a case is made again from its number.
"""

from __future__ import annotations

import copy
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from random import Random

# what stands where a number should
ODD = (
    "0",
    "-1",
    "1",
    "-0.0",
    "3",
    "0.5",
    "1e-30",
    "1e9",
    "-1e15",
    "1e18",
    "1e309",
    "16385",
    "2147483648",
    "-2147483649",
    "18446744073709551616",
    "1" + "0" * 400,
    "9" * 5000,
    "NaN",
    "Infinity",
    "-Infinity",
    "null",
    "true",
    "false",
    '"7"',
    '""',
    '"text"',
    '"\\ud800"',
    '"\\u0000"',
    '"../../up"',
    "[]",
    "{}",
    "[1,2]",
    '{"a":1}',
    "[" * 70 + "]" * 70,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 1200 + "1" + "}" * 1200,
)
ODD_FIELDS = (*ODD[:22], "text", "1,5", "0x10", "1_000", "é", "\u0663", "-", "", "0 0", "1e", "\x0c", "\x85", "\ud800")
WHOLE = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**33,
    2**40,
    2**53,
    2**63 - 1,
    2**64 - 1,
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-40, 1e-12, 1e9, -1e9, 1e13, 1e20, 3e38, float("inf"), float("-inf"), float("nan"))
Mutation = Callable[[bytes, Random], bytes]


# ----------------------------------------------------------------------------------------------------------------- bytes


def flipped(content: bytes, random: Random) -> bytes:
    """One to eight bits."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def moved(content: bytes, random: Random) -> bytes:
    """A run left out, doubled, zeroed, or filled with noise."""
    start = random.randrange(len(content))
    end = min(len(content), start + random.choice((1, 2, 8, 64, 512)))
    noise = random.choice((b"", content[start:end] * 2, bytes(end - start), random.randbytes(end - start)))
    return content[:start] + noise + content[end:]


def numbered(content: bytes, random: Random) -> bytes:
    """A whole number or a float of 1, 2, 4 or 8 bytes written over whatever is there."""
    kind = random.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q", "<f", "<d"))
    bits = 8 * struct.calcsize(kind)
    value = random.choice(FLOATS) if kind[1] in "fd" else random.choice(WHOLE) % 2**bits
    packed = struct.pack(kind, value)
    start = random.randrange(max(1, len(content) - len(packed) + 1))
    return content[:start] + packed + content[start + len(packed) :]


def early(mutation: Mutation, reach: int = 256) -> Mutation:
    """The same within the first bytes, where headers are."""
    return lambda content, random: mutation(content[:reach], random) + content[reach:]


def inside(mutation: Mutation, start: int) -> Mutation:
    """The same behind so many bytes."""
    return lambda content, random: content[:start] + mutation(content[start:], random)


RAW = (flipped, cut, moved, numbered)


# ------------------------------------------------------------------------------------------------------------------ texts


def renumbered(content: bytes, random: Random) -> bytes:
    """A number of a text replaced by something odd."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?", content))
    if not found:
        return flipped(content, random)
    match, odd = random.choice(found), random.choice(ODD_FIELDS).encode("utf-8", "surrogatepass")
    return content[: match.start()] + odd + content[match.end() :]


def relined(content: bytes, random: Random) -> bytes:
    """A line left out, doubled, joined with the next, or swapped with another."""
    lines = content.split(b"\n")
    i, j = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(4):
        case 0:
            del lines[i]
        case 1:
            lines.insert(i, lines[i])
        case 2:
            lines[i : i + 2] = [b" ".join(lines[i : i + 2])]
        case 3:
            lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


def retyped(content: bytes, random: Random) -> bytes:
    """A value somewhere in a JSON text replaced by something odd, left out, renamed, wrapped or put elsewhere."""
    value = json.loads(content)
    places = [((), value)]
    for path, item in places:  # grows while it is walked
        children = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        places += [((*path, key), child) for key, child in children]
    path, item = random.choice(places)
    odd = random.choice(ODD)
    marker = "\x01odd\x01"
    match random.randrange(6):
        case 0 | 1 | 2:
            new = marker
        case 3:
            new = [item]
        case 4:
            new = copy.deepcopy(random.choice(places)[1])
        case 5:
            new = None
    if not path:
        value = new
    else:
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if new is None and isinstance(holder, dict):
            holder[random.choice(("", "0", "renamed", "\u00b2", path[-1] + "2"))] = holder.pop(path[-1])
        elif new is None:
            del holder[path[-1]]
        else:
            holder[path[-1]] = new
    return json.dumps(value).replace(json.dumps(marker), odd).encode()


TEXT = (flipped, cut, moved, renumbered, renumbered, relined)
JSON = (flipped, cut, moved, renumbered, retyped, retyped, retyped)


# --------------------------------------------------------------------------------------------------------------- archives


def in_zip(mutations: tuple[Mutation, ...], only: str = "") -> Mutation:
    """A member of a zip mutated, all sums right."""

    def mutate(content: bytes, random: Random) -> bytes:
        target = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as written:
            chosen = random.choice([name for name in source.namelist() if name.endswith(only)])
            for info in source.infolist():
                data = source.read(info)
                written.writestr(
                    info.filename, random.choice(mutations)(data, random) if info.filename == chosen else data
                )
        return target.getvalue()

    return mutate


def lying_zip(content: bytes, random: Random) -> bytes:
    """A field of an entry of a zip's directory, or of the end of it, or of a member's own header, set to something else."""
    magic, fields = random.choice(
        (
            (b"PK\x01\x02", ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (34, 2), (42, 4))),
            (b"PK\x03\x04", ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
            (b"PK\x05\x06", ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
        )
    )
    starts = [match.start() for match in re.finditer(re.escape(magic), content)]
    if not starts:
        return flipped(content, random)
    offset, size = random.choice(fields)
    start = random.choice(starts) + offset
    value = random.choice(WHOLE) % 256**size
    return content[:start] + value.to_bytes(size, "little") + content[start + size :]


def big_array(content: bytes, random: Random) -> bytes:
    """The header of a .npy promises another shape or type."""
    shape = random.choice(
        (
            b"(1000000000,)",
            b"(1152921504606846976,)",
            b"(65536, 65536)",
            b"(-1,)",
            b"(0,)",
            b"()",
            b"(3,)",
            b"None",
            b"(1e3,)",
            b"((((((((1,),),),),),),),)",
            b"(9223372036854775808,)",
            b"(True,)",
            b"'x'",
            b"(4, 4)",
            b"(" * 200,
        )
    )
    kind = random.choice(
        (
            b"'<f8'",
            b"'|O'",
            b"'<f4'",
            b"'>f8'",
            b"'<U9'",
            b"'|V800'",
            b"'<c16'",
            b"'<M8[s]'",
            b"[('a', '<f8')]",
            b"('<f8', (99999,))",
            b"'?'",
        )
    )
    start = content.index(b"{")
    end = content.index(b"\n", start) + 1
    header = content[start:end]
    if random.random() < 0.6:
        header = re.sub(rb"'shape': \(.*?\)", lambda _: b"'shape': " + shape, header)
    else:
        header = re.sub(rb"'descr': '.*?'", lambda _: b"'descr': " + kind, header)
    header = header.strip()
    header += b" " * (-(start + len(header) + 1) % 64) + b"\n"
    return content[: start - 2] + struct.pack("<H", len(header)) + header + content[end:]


NPZ = (in_zip((flipped, moved, cut, numbered)), in_zip((big_array, big_array, early(flipped))), lying_zip, *RAW)
NPY = (*RAW, early(flipped), big_array, big_array)


def safetensors_header(content: bytes, random: Random) -> bytes:
    """The header of a .safetensors file with something odd in it, its length right."""
    length = int.from_bytes(content[:8], "little")
    header = random.choice((retyped, retyped, renumbered, flipped))(content[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


SAFETENSORS = (*RAW, early(numbered, 16), safetensors_header, safetensors_header)


def pickled(content: bytes, random: Random) -> bytes:
    """An instruction put into a pickle that asks for much, or goes where it should not."""
    instruction = random.choice(
        (
            b"r" + struct.pack("<I", 2**31 - 1),
            b"r" + struct.pack("<I", 2**32 - 1),
            b"q\xff",
            b"j" + struct.pack("<I", 2**31),
            b"h\x00",
            b"p2147483647\n",
            b"I" + b"9" * 5000 + b"\n",
            b"\x8b" + struct.pack("<I", 2**30),
            b"\x8a\xff",
            b"X" + struct.pack("<I", 2**31),
            b"\x8d" + struct.pack("<Q", 2**40),
            b"\x8e" + struct.pack("<Q", 2**63),
            b"\x96" + struct.pack("<Q", 2**36),
            b"\x95" + struct.pack("<Q", 2**40),
            b"cos\nsystem\n",
            b"cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R",
            b"ctorch\nSize\n",
            b"}",
            b"]",
            b"(",
            b"0",
            b"2",
            b"N",
            b"b",
            b"R",
            b"\x81",
            b".",
            b"(" * 50,
            b"]a" * 50,
            b"K\x05",
            b"J\xff\xff\xff\xff",
            b"\x85" * 5000,
            b"(lp0\n" + b"(h\x00h\x00l" * 3,
            b"Q",
            b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
        )
    )
    start = random.randrange(2, len(content))
    over = random.choice((0, 0, 1, len(instruction)))
    return content[:start] + instruction + content[start + over :]


PICKLE = (*RAW, pickled, pickled)
TORCH = (
    in_zip(PICKLE, "data.pkl"),
    in_zip(PICKLE, "data.pkl"),
    in_zip((lambda content, random: random.choice((b"big", b"", b"little\n", b"\xff" * 9)),), "byteorder"),
    in_zip(RAW),
    lying_zip,
    *RAW,
)
