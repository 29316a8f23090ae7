"""The characters that an OCR engine can read, from the files of its package."""

import importlib.util
import io
import os
import pathlib
from typing import BinaryIO


def readable_characters(engine: str) -> frozenset[str] | None:
    """Return the characters that an engine built without options can read.

    They come from the files of the engine's package; the networks are not loaded. None where the
    package is not installed, or keeps the list elsewhere.
    """
    name, pattern = CHARACTER_LISTS[engine]
    package = importlib.util.find_spec(name)
    if package is None or not package.submodule_search_locations:
        return None
    files = sorted(pathlib.Path(package.submodule_search_locations[0]).glob(pattern))
    if len(files) != 1:
        return None
    if files[0].suffix == ".txt":
        text = files[0].read_text(encoding="utf-8")
    else:
        text = _onnx_metadata(files[0], "character")
    return frozenset(text.replace("\n", "")) | {" "} if text else None


def _onnx_metadata(path: pathlib.Path, key: str) -> str | None:
    """Return the value of `key` in the `metadata_props` of an ONNX file, or None; the rest of the
    file is skipped.

    ONNX files are protobuf messages. A field is a tag, 8 x number + type, and for type 2 a length
    and as many bytes. `metadata_props` is field 14 of a model; key and value are fields 1 and 2 of
    its entries.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while file.tell() < size:
            tag, length = _varint(file), _varint(file)
            if tag % 8 == 0:
                continue  # type 0: what follows the tag is the value itself, not a length
            if tag % 8 != 2:
                return None
            if tag != 8 * 14 + 2:
                file.seek(length, os.SEEK_CUR)
                continue
            entry, fields = io.BytesIO(file.read(length)), {}
            while field := entry.read(1):
                fields[field[0] // 8] = entry.read(_varint(entry)).decode("utf-8")
            if fields.get(1) == key:
                return fields.get(2)
    return None


def _varint(file: BinaryIO) -> int:
    """Read a protobuf varint: seven bits per byte, lowest first; the highest bit of a byte tells
    whether another one follows.
    """
    value, shift = 0, 0
    while True:
        byte = file.read(1)[0]
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value


# {engine: (its package, pattern of the file in it that lists the characters)}
CHARACTER_LISTS = {
    "rapidocr": ("rapidocr", "models/*_rec_*.onnx"),
    "rapidocr_v4": ("rapidocr_onnxruntime", "models/*_rec_*.onnx"),
    "paddleocr": ("paddleocr", "ppocr/utils/en_dict.txt"),
}
