"""The facts of one ELF file that decide whether it is sound: how it is linked, protected and identified."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerDefSection, GNUVerNeedSection
from elftools.elf.sections import NoteSection, SymbolTableSection

from image.build import BuildError


@dataclass
class Elf:
    """The facts about one program or library that decide whether it is sound."""

    path: str
    kind: str = ""
    pie: bool = False
    relro: bool = False
    bind_now: bool = False
    executable_stack: bool = True
    writable_code: bool = False
    text_relocations: bool = False
    runpath: str = ""
    stack_protector: bool = False
    fortified: int = 0
    debug_link: bool = False
    debug_info: bool = False
    build_id: str = ""
    isa: str = "baseline"
    needed: tuple[str, ...] = ()
    interpreter: bool = False
    wants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    defines: frozenset[str] = frozenset()


def read_elf(path: Path, name: str) -> Elf | None:
    """None for anything that is not a 64-bit program or library."""
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        file.seek(0)
        try:
            elf = ELFFile(file)
            if elf["e_type"] not in ("ET_DYN", "ET_EXEC") or elf.elfclass != 64:
                return None
            return _facts(elf, Elf(name, kind=elf["e_type"]))
        except ELFError as error:
            raise BuildError(f"{name} in the image is not a readable ELF file: {error}") from error


def text_of(tag: object, name: str) -> str:
    """pyelftools gives a tag the attributes that its kind has, which no type can say."""
    return str(getattr(tag, name))


def _facts(elf: ELFFile, facts: Elf) -> Elf:
    for segment in elf.iter_segments():
        match segment["p_type"]:
            case "PT_GNU_RELRO":
                facts.relro = True
            case "PT_GNU_STACK":
                facts.executable_stack = bool(segment["p_flags"] & 1)
            case "PT_LOAD" if segment["p_flags"] & 3 == 3:
                facts.writable_code = True
            case "PT_INTERP":
                facts.interpreter = True
    needed = []
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                match tag.entry.d_tag:
                    case "DT_NEEDED":
                        needed.append(text_of(tag, "needed"))
                    case "DT_RPATH" | "DT_RUNPATH":
                        name = "rpath" if tag.entry.d_tag == "DT_RPATH" else "runpath"
                        facts.runpath = text_of(tag, name)
                    case "DT_TEXTREL":
                        facts.text_relocations = True
                    case "DT_BIND_NOW":
                        facts.bind_now = True
                    case "DT_FLAGS":
                        facts.bind_now |= bool(tag.entry.d_val & 8)
                        facts.text_relocations |= bool(tag.entry.d_val & 4)
                    case "DT_FLAGS_1":
                        facts.bind_now |= bool(tag.entry.d_val & 1)
                        facts.pie = bool(tag.entry.d_val & 0x08000000)
        elif isinstance(section, GNUVerNeedSection):
            facts.wants = {
                str(lib.name): tuple(str(aux.name) for aux in versions)
                for lib, versions in section.iter_versions()
            }
        elif isinstance(section, GNUVerDefSection):
            facts.defines = frozenset(str(next(iter(names)).name) for _, names in section.iter_versions())
        elif isinstance(section, SymbolTableSection) and section.name == ".dynsym":
            names = [symbol.name for symbol in section.iter_symbols()]
            facts.stack_protector = "__stack_chk_fail" in names
            facts.fortified = sum(
                1 for symbol in names if symbol.endswith("_chk") and symbol != "__stack_chk_fail"
            )
        elif isinstance(section, NoteSection):
            for note in section.iter_notes():
                if note["n_type"] == "NT_GNU_BUILD_ID":
                    facts.build_id = str(note["n_desc"])
                elif note["n_type"] == "NT_GNU_PROPERTY_TYPE_0":
                    facts.isa = _isa(note) or facts.isa
        facts.debug_link |= section.name == ".gnu_debuglink"
        facts.debug_info |= section.name.startswith((".debug_", ".zdebug_"))
    facts.needed = tuple(needed)
    return facts


def _isa(note: object) -> str:
    for entry in note["n_desc"]:  # type: ignore[index]  # pyelftools has no types for notes
        if entry.pr_type == 0xC0008002:  # GNU_PROPERTY_X86_ISA_1_NEEDED
            level = int(entry.pr_data)
            return "baseline" if level <= 1 else f"x86-64-v{level.bit_length()}"
    return ""
