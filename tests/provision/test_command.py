"""The program as an operator meets it: sentences and exit statuses, before any gateway is asked."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from provision.__main__ import cli, main
from provision.cluster import keep_slices
from provision.journal import Journal, JournalError, last_run
from provision.load import load, slices_file
from provision.verbs.look import pool_use
from tests.provision.conftest import CLUSTER, LONE, PAIR, changed

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, status: int = 0) -> str:
    """In this process: thirty interpreters would take longer than all they test."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
        patch.setattr(sys, "argv", ["dsnat-fleet", *words])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == status, f"{end.value.code}: {out.getvalue()}"
    return out.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(changed(LONE, ("address: 192.0.2.11", "address: 127.0.0.1, port: 1")))  # nobody there
    return path


def test_help_answers_at_once() -> None:
    """In processor time of this process and its children: a busy machine must not make it fail."""
    took = []
    for _ in range(3):
        program = (
            "import time; t = time.process_time(); import provision.__main__, sys; "
            "sys.argv = ['dsnat-fleet', '--help']\n"
            "try: provision.__main__.main()\n"
            "except SystemExit: print(time.process_time() - t, file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        took.append(float(done.stderr))
    assert min(took) < 0.1


def test_help_imports_neither_ssh_nor_tables() -> None:
    program = (
        "import provision.__main__, sys; sys.exit(bool({'paramiko', 'rich', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_good_file_is_valid(file: Path) -> None:
    assert "valid; 1 gateways, 0 pairs, 1 pools with 4 addresses" in run("--file", str(file), "validate")
    assert json.loads(run("--file", str(file), "validate", "--json")) == {"ok": True, "problems": []}


def test_a_bad_file_ends_every_verb_with_two_and_all_its_errors(file: Path) -> None:
    file.write_text(changed(LONE, ("id: 10", "id: 1000"), ("pool: home", "pool: hone")))
    for verb in ("validate", "plan", "push", "status", "drift", "confirm"):
        assert "fleet.yaml:13:23" in run("--file", str(file), verb, status=2)
    problems = json.loads(run("--file", str(file), "validate", "--json", status=2))["problems"]
    assert problems[0]["line"] == 13


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    text = run("--file", str(tmp_path / "none.yaml"), "plan", status=2)
    assert "none.yaml: cannot be read (No such file or directory); name an existing file with --file" in text


def test_a_secret_that_is_not_there_is_said_before_anything_is_sent(file: Path) -> None:
    secret = ("    vrrp:\n", "    vrrp:\n      version: 2\n      authentication: {password: 'env:NOT_SET'}\n")
    file.write_text(changed(LONE, secret))
    assert "env:NOT_SET: NOT_SET is not set in the environment" in run("--file", str(file), "plan", status=2)


def test_a_pools_use_is_its_sessions_how_full_it_is_and_what_it_refused() -> None:
    pool = {"name": "a", "sessions": 30, "n_ports": 1000, "mapping": "endpoint-independent", "refused": 0}
    used = {"mappings": {"tcp": 250, "udp": 20, "icmp": 0}}
    assert pool_use(pool | used) == "a:30 (25% of ports)"
    assert pool_use(pool | used | {"mapping": "endpoint-dependent"}) == "a:30"
    assert pool_use(pool | used | {"mapping": "endpoint-dependent", "refused": 7}) == "a:30 (7 refused)"
    assert pool_use({"name": "old", "sessions": 3}) == "old:3"


def test_a_limit_that_names_nobody_is_an_error(file: Path) -> None:
    assert "--limit gw9: no gateway, pair or site has this name" in run(
        "--file", str(file), "plan", "--limit", "gw9", status=2
    )


def test_a_push_that_nobody_can_be_asked_about_needs_yes(file: Path) -> None:
    assert "not reached: gw1" in run("--file", str(file), "push", status=3)


def test_the_files_of_a_gateway_are_printed_without_a_network(file: Path) -> None:
    assert "==> keepalived.conf\n" in run("--file", str(file), "render", "gw1")
    for verb in ("render", "drain"):
        text = run("--file", str(file), verb, "gw9", status=2)
        assert "there is no gateway gw9" in text
        assert 'did you mean "gw1"?' in text


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (
            "push --plan none",
            2,
            "none cannot be read (No such file or directory); name a saved",
        ),
        (
            "push --plan fleet.yaml",
            2,
            "fleet.yaml is not a saved plan; make one with plan --out",
        ),
        ("update .", 2, ". holds no image; name the folder that `make image` filled"),
        (
            "import none",
            2,
            "none cannot be read (No such file or directory); name dsnat's own files",
        ),
        ("slices", 0, "has no cluster; pools are cut only for those"),
    ],
)
def test_what_a_verb_cannot_read_or_write_is_one_sentence(
    file: Path, monkeypatch: pytest.MonkeyPatch, words: str, status: int, said: str
) -> None:
    monkeypatch.chdir(file.parent)
    text = run(*words.split(), status=status)
    assert said in text.splitlines()[-1]
    assert "Errno" not in text


def test_an_option_of_import_for_a_gateway_that_there_is_not_is_an_error() -> None:
    example = str(ROOT / "tests/provision/dsnat/keepalived.conf")
    text = run("import", example, "--management", "gw9=192.0.2.9", status=2)
    assert text == "dsnat-fleet: the options speak of gw9; the files describe gw1\n"


def test_drift_says_nothing_of_gateways_that_were_not_reached(file: Path) -> None:
    assert "no drift" not in run("--file", str(file), "drift", status=3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            b"\tschema: 1\n",
            "fleet.yaml:1:1: not valid YAML: found character '\\t' that cannot start any token; indent",
        ),
        (
            b"schema: 1\n--- b\n",
            "not valid YAML: expected a single document in the stream, but found",
        ),
        (b"schema: \xff\n", "fleet.yaml:1:1: is not UTF-8 text (byte 8); save it as such"),
        (b"", "fleet.yaml: is empty; it starts with schema: 1"),
    ],
)
def test_a_text_that_is_no_yaml_is_said_with_its_place_and_what_to_do(
    file: Path, text: bytes, said: str
) -> None:
    file.write_bytes(text)
    assert said in run("--file", str(file), "validate", status=2)


def test_known_hosts_lines_are_those_of_openssh(file: Path) -> None:
    file.write_text(changed(PAIR, ("{address: 192.0.2.12}", "{address: 192.0.2.12, port: 2222}")))
    lines = run("--file", str(file), "keys", "--known-hosts").splitlines()
    assert lines[0].startswith("192.0.2.11 ssh-ed25519 AAAA")
    assert lines[1].startswith("[192.0.2.12]:2222 ssh-ed25519 AAAA")
    told = json.loads(run("--file", str(file), "keys", "--known-hosts", "--json"))
    assert list(told.values()) == lines


def test_the_schema_knows_every_key() -> None:
    schema = json.loads(run("schema"))
    assert "schema" in schema["properties"]
    assert "announce" in schema["$defs"]["Pool"]["properties"]
    device = schema["$defs"]["Interface"]["properties"]["device"]["anyOf"][0]["pattern"]
    assert re.match(device, "0000:00:03.0")
    assert not re.match(device, "eth0")


def test_a_node_of_dsnat_is_imported_from_the_command_line(tmp_path: Path) -> None:
    example = Path(__file__).parent / "dsnat/keepalived.conf"
    words = ["--management", "gw1=192.0.2.11", "--interface", "gw1:eth0=1.1.0.2/16,0000:00:03.0"]
    text = run("import", str(example), *words)
    assert 'eth0: {role: inside, path: dpdk, device: "0000:00:03.0", addresses: [1.1.0.2/16]}' in text
    assert "keepalived.conf:60: syn_proxy had no effect" in text
    run("import", str(tmp_path / "none"), status=2)
    (tmp_path / "bin").write_bytes(b"\x7fELF\0\x1b[2J")
    assert "is not a text file" in run("import", str(tmp_path / "bin"), status=2)
    (tmp_path / "odd").write_text("\x1b[2J {\n}\n" + example.read_text())
    assert "\x1b" not in run("import", str(tmp_path / "odd"))
    told = json.loads(run("import", "--json", str(example), *words))
    assert told["fleet"].startswith("# Imported from dsnat")
    assert any("syn_proxy had no effect" in remark for remark in told["remarks"])


def test_every_verb_takes_json() -> None:
    help_ = run("--help")
    verbs = [line.split()[0] for line in help_.partition("Commands:")[2].strip().splitlines()]
    assert [verb for verb in verbs if "--json" not in run(verb, "--help")] == []
    assert run("schema") == run("schema", "--json")


def test_resume_without_a_run_says_so(file: Path) -> None:
    assert "there is no run to go on with" in run("--file", str(file), "resume", status=2)


def test_a_run_whose_wishes_have_changed_is_stale(file: Path) -> None:
    Journal(file.parent, "p", {"gw1": "another digest"})
    assert "wants something else of gw1" in run("--file", str(file), "resume", status=8)


def test_a_journal_tells_who_is_left(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "p", {"gw1": "a", "gw2": "b", "gw3": "c"})
    journal.add({"gateway": "gw1", "outcome": "confirmed"})
    journal.add({"gateway": "gw2", "outcome": "reverted"})
    with journal.path.open("a") as torn:
        torn.write('{"gateway": "gw3", "outc')
    assert last_run(tmp_path).left == ["gw2", "gw3"]


@pytest.mark.parametrize("text", ["\n", "3\n", "[]\n", '{"run": "p"}\n'])
def test_a_journal_that_says_nothing_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / ".dsnat-fleet").mkdir()
    (tmp_path / ".dsnat-fleet/x.jsonl").write_text(text)
    with pytest.raises(JournalError, match="does not say what the run was about"):
        last_run(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "3", '{"hash": "x", "limit": 3}', '{"hash": "x", "limit": [3]}'])
def test_a_saved_plan_that_is_none_is_refused_before_anybody_is_asked(file: Path, text: str) -> None:
    saved = file.with_name("plan.json")
    saved.write_text(text)
    said = run("--file", str(file), "push", "--yes", "--plan", str(saved), status=2)
    assert said == f"dsnat-fleet: {saved} is not a saved plan; make one with plan --out\n"


def test_a_file_that_cannot_be_written_is_one_sentence(file: Path) -> None:
    said = run("--file", str(file), "plan", "--out", str(file / "plan.json"), status=1)
    assert said == f"dsnat-fleet: {file}/plan.json cannot be written (Not a directory); give another --out\n"


@pytest.mark.parametrize(("buffered", "status"), [("", 0), ("1", 1)])
def test_a_reader_that_has_gone_away_gets_no_traceback(file: Path, buffered: str, status: int) -> None:
    """Gone before the last line was written, all is done; before that, not."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "provision", "--file", str(file), "validate"],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": buffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, b"")


def test_unknown_verbs_and_options_end_with_two() -> None:
    run("nonsense", status=2)
    run("plan", "--nonsense", status=2)


def test_every_verb_and_option_in_the_readmes_table_is_one_that_the_tool_takes() -> None:
    table = (ROOT / "provision/README.md").read_text().partition("## The verbs")[2].partition("\n\n")[0]
    rows = [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| `")]
    verbs = {verb for row in rows for verb in re.findall(r"`([a-z]+)", row)}
    assert verbs == set(cli.commands)
    for row in rows:
        for words in re.findall(r"`([^`]+)`", row):
            takes = {opt for one in cli.commands[words.split()[0]].params for opt in one.opts}
            assert set(re.findall(r"--[a-z-]+", words)) <= takes, words


def test_the_examples_in_the_readme_are_valid(tmp_path: Path) -> None:
    text = (ROOT / "provision/README.md").read_text()
    examples = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    assert len(examples) == 3
    for example in examples:
        (tmp_path / "fleet.yaml").write_text(example)
        run("--file", str(tmp_path / "fleet.yaml"), "validate")


def test_every_verb_is_in_the_readme() -> None:
    help_ = run("--help")
    verbs = [line.split()[0] for line in help_.partition("Commands:")[2].strip().splitlines()]
    table = (ROOT / "provision/README.md").read_text()
    assert [verb for verb in verbs if f"`{verb}" not in table] == []


def test_slices_are_listed_and_a_lost_member_frees_its_own(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(CLUSTER)
    assert re.search(r"north +public +gw2 +16 +203\.0\.113\.16/28", run("--file", str(path), "slices"))
    fleet, _ = load(path)
    keep_slices(slices_file(path), fleet)
    path.write_text(CLUSTER[: CLUSTER.index("  gw4:")])
    text = run("--file", str(path), "slices", status=2)
    assert "gw4 had 203.0.113.48-203.0.113.63 and is not in cluster north any more" in text
    run("--file", str(path), "slices", "--lost", "gw9", status=2)
    shown = json.loads(run("--file", str(path), "slices", "--lost", "gw4", "--json"))
    assert shown["north"]["public"]["gw1"][0] == "203.0.113.0-203.0.113.15"
    assert "gw4" not in slices_file(path).read_text()
    run("--file", str(path), "validate")


def test_a_member_that_is_still_there_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(CLUSTER)
    fleet, _ = load(path)
    keep_slices(slices_file(path), fleet)
    assert "gw4 is still in" in run("--file", str(path), "slices", "--lost", "gw4", status=2)
