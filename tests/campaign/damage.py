"""Damage files and folders in ways that people and machines do, driven by a random generator."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

#: Values that JSON allows and that no reader here expects at a random place.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3.5, 10**30, -(10**12), "", "gone", "../x", "/etc/passwd", [], {}, [None], [-1],
    [10**9], ["a"], {"a": 1}, [[[]]], "x" * 5000, "nan", 1e308, [0, 0], "\u0000", "name\nline",
)  # fmt: skip

#: Words for the value of a key on the command line.
ODD_WORDS = (
    "null", "''", "true", "false", "0", "-1", "1", "2", "3.5", "1e999", "nan", "-inf",
    "1000000000000000000000", "abc", "[]", "[1]", "[1,2]", "[a,b]", "{}", "{a:1}", "../x", "/dev/null/x", "~nobody/x",
    "a b", "é", "[[1]]", "auto", "none", "'a=b'", "'[1'", "'#'", "${seed}", "${nowhere}", "???", "[null]",
    "{_target_:os.system}", "0.05", "4",
)  # fmt: skip


def damage_bytes(content: bytes, chance: random.Random) -> bytes:
    """Cut, flip, insert, repeat or replace bytes of a file's content."""
    kind = chance.randrange(8)
    if kind == 0:
        return b""
    if kind == 1:
        return content[: chance.randrange(len(content) + 1)]
    if kind == 2 and content:
        changed = bytearray(content)
        for _ in range(chance.choice((1, 8, 64))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    if kind == 3:
        place = chance.randrange(len(content) + 1)
        return content[:place] + chance.randbytes(chance.choice((1, 16, 300))) + content[place:]
    if kind == 4:
        return chance.randbytes(chance.choice((1, 100, 3000)))
    if kind == 5:
        return chance.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PAR1", b"{", b"[" * 100_000)) + content
    if kind == 6:
        return content.decode("latin-1").encode("utf-16")
    return content + content


def damage_json(value: Any, chance: random.Random) -> Any:
    """Replace, drop or add a value at a random place of a JSON document."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        action = chance.random()
        changed = dict(value)
        if action < 0.12:
            del changed[key]
        elif action < 0.2:
            changed[chance.choice(("extra", "schema", "", "__class__"))] = chance.choice(ODD_VALUES)
        else:
            changed[key] = damage_json(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        action = chance.random()
        changed_list = list(value)
        if action < 0.15:
            del changed_list[place]
        elif action < 0.3:
            changed_list.insert(place, chance.choice(ODD_VALUES))
        elif action < 0.4:
            chance.shuffle(changed_list)
        else:
            changed_list[place] = damage_json(value[place], chance)
        return changed_list
    return chance.choice(ODD_VALUES)


def damage_safetensors(content: bytes, chance: random.Random) -> bytes:
    """Change the header of a safetensors file: dtypes, shapes, offsets, names, its length."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    kind = chance.randrange(5)
    if kind == 0:
        return struct.pack("<Q", chance.choice((0, 1, 2**63, 10**12, length + 1))) + content[8:]
    if kind == 1:
        name = chance.choice([key for key in header if key != "__metadata__"])
        header[name]["dtype"] = chance.choice(("I32", "F64", "F8_E4M3", "BOOL", "X", 3, "I16", "BF16", "F16"))
    elif kind == 2:
        name = chance.choice([key for key in header if key != "__metadata__"])
        header[name + chance.choice((".bias", "2", "x"))] = header.pop(name)
    else:
        header = damage_json(header, chance)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def damage_file(path: Path, chance: random.Random) -> str:
    """Damage one file in place, or put something else where it was; returns what was done."""
    action = chance.random()
    if action < 0.06:
        path.unlink()
        return "removed"
    if action < 0.1:
        path.unlink()
        path.mkdir()
        return "made a folder"
    if action < 0.13:
        path.unlink()
        os.mkfifo(path)
        return "made a FIFO"
    if action < 0.16:
        path.unlink()
        path.symlink_to(chance.choice(("/dev/zero", "/nowhere", "/etc/hostname", str(path))))
        return "made a link"
    content = path.read_bytes()
    if path.suffix == ".json" and action < 0.75:
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            document = None
        path.write_text(json.dumps(damage_json(document, chance)), encoding="utf-8")
        return "changed a value"
    if path.suffix == ".safetensors" and action < 0.6 and len(content) > 8:
        try:
            path.write_bytes(damage_safetensors(content, chance))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError):
            path.write_bytes(damage_bytes(content, chance))
        return "changed the header"
    path.write_bytes(damage_bytes(content, chance))
    return "changed bytes"


def damage_folder(folder: Path, chance: random.Random, names: tuple[str, ...] = ()) -> str:
    """Damage one file of a folder (one of ``names`` where given), or add one that does not belong there."""
    if not names and chance.random() < 0.08:
        name = chance.choice(
            ("plan.json", "adapter_config.json", "model.safetensors.index.json", "tokenizer.py", "cfsp_checkpoint.json")
        )
        (folder / name).write_text(json.dumps(chance.choice(ODD_VALUES)), encoding="utf-8")
        return f"added {name}"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and (not names or path.name in names))
    if not files:
        return "nothing"
    path = chance.choice(files)
    return f"{path.name}: {damage_file(path, chance)}"


def fresh_copy(source: Path, target: Path) -> Path:
    """Copy a folder to ``target``, replacing what is there."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
