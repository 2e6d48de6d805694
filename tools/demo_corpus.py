"""The text the bundled demo model learns from, read out of Debian packages.

Owns: reading each package's own format, cleaning the text, cutting it into documents, and
holding whole documents out. Never downloads: `--debs` is a folder filled beforehand with
`apt-get download` (models/demo/README.md lists the packages). Needs `dpkg` to unpack them.

The output is an xz-compressed file of JSON lines: source, name, held_out, and text or messages.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from demo_chat import Message, chat_documents

# The books both Bibles share, in the order both print them: a chapter held out of one is held
# out of the other under the same name.
SHARED_BOOKS = [
    "Gen",
    "Exod",
    "Lev",
    "Num",
    "Deut",
    "Josh",
    "Judg",
    "Ruth",
    "1Sam",
    "2Sam",
    "1Kgs",
    "2Kgs",
    "1Chr",
    "2Chr",
    "Ezra",
    "Neh",
    "Esth",
    "Job",
    "Ps",
    "Prov",
    "Eccl",
    "Song",
    "Isa",
    "Jer",
    "Lam",
    "Ezek",
    "Dan",
    "Hos",
    "Joel",
    "Amos",
    "Obad",
    "Jonah",
    "Mic",
    "Nah",
    "Hab",
    "Zeph",
    "Hag",
    "Zech",
    "Mal",
    "Matt",
    "Mark",
    "Luke",
    "John",
    "Acts",
    "Rom",
    "1Cor",
    "2Cor",
    "Gal",
    "Eph",
    "Phil",
    "Col",
    "1Thess",
    "2Thess",
    "1Tim",
    "2Tim",
    "Titus",
    "Phlm",
    "Heb",
    "Jas",
    "1Pet",
    "2Pet",
    "1John",
    "2John",
    "3John",
    "Jude",
    "Rev",
]
# Second tellings of Esther and Daniel: they would leak those books' held-out chapters.
SECOND_TELLINGS = {"EsthGr", "DanGr"}
AUSTEN = ("Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride and Prejudice")
AUSTEN += ("Sense and Sensibility",)
CHAPTER = re.compile(r"^(?:CHAPTER|Chapter) (?:[0-9]+|[IVXLC]+)\b.*$", re.M)
ADVENTURE = re.compile(r"^(?:ADVENTURE [IVX]+\.|[IVX]+\. THE ADVENTURE).*$", re.M)
MIN_CHARS = 400
HELD_OUT_ONE_IN = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One chapter, story, dictionary entry or conversation."""

    source: str
    name: str
    held_out: bool
    text: str = ""
    messages: tuple[Message, ...] = ()


def is_held_out(name: str) -> bool:
    """The same name always falls on the same side, in every source and on every machine."""
    digest = hashlib.sha256(f"kvmesh demo {name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def clean(text: str) -> str:
    """Plain quotes and dashes, one line per paragraph, a blank line between paragraphs."""
    text = text.translate(str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "\r": ""}))
    text = text.replace("—", "--").replace("_", "").replace("\ufeff", "")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part)


def novel(title: str, text: str, heading: re.Pattern[str]) -> Iterator[Document]:
    """One document per chapter; front matter and tables of contents fall away."""
    text = text.replace("\r", "")
    start = re.search(r"\*\*\* START OF THIS PROJECT.*", text)
    end = re.search(
        r"\*\*\* END OF THIS PROJECT|End of (?:the )?Project|^\s*(?:FINIS|THE END|Finis)",
        text,
        re.M,
    )
    text = text[start.end() if start else 0 : end.start() if end else None]
    for index, part in enumerate(heading.split(re.sub(r"^VOLUME .*$", "", text, flags=re.M))[1:]):
        body = clean(part)
        if len(body) >= MIN_CHARS:
            name = f"{title} {index + 1}"
            yield Document(source="novels", name=name, held_out=is_held_out(name), text=body)


def r_objects(base: Path) -> list[bytes]:
    """The serialized objects of an R package's lazy-load database, in its index's order."""
    index = zlib.decompress(base.with_suffix(".rdx").read_bytes(), 47)
    data = base.with_suffix(".rdb").read_bytes()
    places = re.findall(rb"\x00\x00\x00\x0d\x00\x00\x00\x02(.{8})", index, re.S)
    spans = [struct.unpack(">ii", place) for place in places]
    return [zlib.decompress(data[offset + 4 : offset + size]) for offset, size in spans]


def r_strings(blob: bytes) -> list[str]:
    """The first character vector in an R serialization (format 3, big-endian)."""
    found = re.search(rb"\x00\x00[\x00\x02]\x10(.{4})(?=\x00.[\x00\x80]\x09)", blob, re.S)
    assert found is not None, "no character vector"
    place, strings = found.end(), []
    for _ in range(struct.unpack(">i", found[1])[0]):
        _, size = struct.unpack_from(">ii", blob, place)
        strings.append(blob[place + 8 : place + 8 + max(size, 0)].decode())
        place += 8 + max(size, 0)
    return strings


def novels(root: Path) -> Iterator[Document]:
    """Austen's six novels, Moby-Dick, Sherlock Holmes, Tom Sawyer."""
    library = root / "usr/lib/R/site-library"
    for title, blob in zip(AUSTEN, r_objects(library / "janeaustenr/data/Rdata"), strict=True):
        yield from novel(title, "\n".join(r_strings(blob)), CHAPTER)
    (moby,) = r_objects(library / "tokenizers/data/Rdata")
    yield from novel("Moby-Dick", "\n".join(r_strings(moby)), CHAPTER)
    go = root / "usr/share/gocode/src/github.com"
    sherlock = (go / "jdkato/prose/testdata/sherlock.txt").read_text()
    yield from novel("Sherlock Holmes", sherlock, ADVENTURE)
    sawyer = (go / "klauspost/compress/testdata/Mark.Twain-Tom.Sawyer.txt").read_text()
    yield from novel("Tom Sawyer", sawyer, CHAPTER)


def king_james(root: Path) -> Iterator[Document]:
    """The package's own program prints the text: a heading, then one indented verse a line."""
    command = [root / "usr/bin/bible", "-p", root / "usr/lib", "-l0", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, input="").stdout
    books: list[str] = []
    for part in re.split(r"^(?=[1-3A-Z].* \d+$)", printed, flags=re.M)[1:]:
        heading, _, verses = part.partition("\n")
        book, chapter = heading.rsplit(" ", 1)
        if book not in books:
            books.append(book)
        name = f"{SHARED_BOOKS[len(books) - 1]} {chapter}"
        text = clean(re.sub(r"^\s+\d+\s", "", verses, flags=re.M).replace("\n\n", "\n"))
        yield Document(source="kjv", name=name, held_out=is_held_out(name), text=text)
    assert len(books) == len(SHARED_BOOKS), books


def sword_books(base: Path) -> Iterator[str]:
    """Each compressed block of a SWORD zText module: one book of marked-up text."""
    for testament in ("ot", "nt"):
        index = (base / f"{testament}.bzs").read_bytes()
        data = (base / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            yield zlib.decompress(data[offset : offset + size]).decode()


def osis_text(markup: str) -> str:
    """Running text of an OSIS chapter: notes and titles out, paragraph breaks kept."""
    markup = re.sub(r"<(note|title|reference)\b.*?</\1>", " ", markup, flags=re.S)
    markup = re.sub(r'<div sID="[^"]*" type="x-p"/>|<lg sID[^>]*>', "\n\n", markup)
    markup = re.sub(r"<(?:l|lg|lb|div|chapter|milestone)\b[^>]*>", " ", markup)
    return re.sub(r" +([,.;:!?])", r"\1", clean(re.sub(r"<[^>]*>", "", markup)))


def world_english(root: Path) -> Iterator[Document]:
    """The World English Bible, with the books the King James lacks."""
    base = root / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    chapters = re.compile(
        r'<chapter [^>]*?osisID="([^".]+)\.(\d+)" sID[^>]*>(.*?)<chapter eID', re.S
    )
    for book in sword_books(base):
        for found in chapters.finditer(book):
            name, text = f"{found[1]} {found[2]}", osis_text(found[3])
            if found[1] not in SECOND_TELLINGS and len(text) >= MIN_CHARS:
                yield Document(source="web", name=name, held_out=is_held_out(name), text=text)


def glosses(root: Path) -> Iterator[Document]:
    """WordNet definitions that carry an example sentence, one document each."""
    for part, kind in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        for line in (root / f"usr/share/wordnet/data.{part}").read_text().splitlines():
            head, _, gloss = line.partition(" | ")
            word = head.split()[4] if gloss else ""
            definition, _, example = gloss.partition('; "')
            if not example or not re.fullmatch(r"[a-z_]+", word):
                continue
            word = word.replace("_", " ")
            example = example.partition('"')[0].strip().rstrip(".;,")
            meaning = definition.strip().rstrip(".;,")
            text = f'{word.capitalize()} ({kind}): {meaning}. For example: "{example}."'
            yield Document(source="wordnet", name=word, held_out=is_held_out(word), text=text)


def devils_dictionary(root: Path) -> Iterator[Document]:
    """Bierce's entries; the verses inside them keep their place as paragraphs."""
    raw = gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
    for part in re.split(r"\n(?=[A-Z][A-Z' -]+, [a-z.]+ )", raw)[1:]:
        text = re.sub(r"\s+(?=[,.;:!?])", "", clean(part))
        name = part.partition(",")[0].lower()
        yield Document(source="devil", name=name, held_out=is_held_out(name), text=text)


def unpack(debs: Path, root: Path) -> None:
    """Unpack every package into one tree; nothing is installed."""
    packages = sorted(debs.glob("*.deb"))
    if not packages:
        raise ValueError(f"no .deb files in {debs}")
    for package in packages:
        subprocess.run(["dpkg", "-x", package, root], check=True, env=os.environ)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--debs", type=Path, required=True, help="folder of downloaded packages")
    parser.add_argument("--out", type=Path, required=True, help="the corpus, a .jsonl.xz file")
    arguments = parser.parse_args()
    documents: list[Document] = []
    with tempfile.TemporaryDirectory() as folder:
        unpack(arguments.debs, Path(folder))
        for reader in (novels, king_james, world_english, glosses, devils_dictionary):
            documents += reader(Path(folder))
    for held_out in (False, True):
        side = [(doc.source, doc.name, doc.text) for doc in documents if doc.held_out is held_out]
        documents += [
            Document(source="chat", name=name, held_out=held_out, messages=messages)
            for name, messages in chat_documents(side)
        ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(arguments.out, "wt", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")  # pyright: ignore[reportArgumentType]
    for source in sorted({document.source for document in documents}):
        for held_out in (False, True):
            texts = [d for d in documents if d.source == source and d.held_out is held_out]
            size = sum(len(d.text) + sum(len(m["content"]) for m in d.messages) for d in texts)
            print(f"{source:8} held_out={held_out!s:5} documents={len(texts):6} chars={size}")


if __name__ == "__main__":
    main()
