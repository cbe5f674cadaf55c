"""The operator's command for the engine: it speaks to the control socket, and to nothing else.

    __main__.py   one run of the command, and every way it ends
    arguments.py  the words of the command line   words.py          the man page and completion from them
    ask.py        verbs that only ask             act.py            verbs that change something
    watch.py      verbs that look for longer: capture.py (pcapng.py), top.py, metrics.py, support.py
    answer.py     what verbs share                client.py         one line of JSON there, one back
    show.py       answers as tables for people    sync.py           the one about a pair
    explain.py    makes the packet asked about, tells what the engine saw
    plan.py       what a file would change        rfc.py            what the settings give up
    metrics.py    the page for Prometheus         deterministic.py  whose a port is, by arithmetic
    release.py    takes away what the engine leaves in the kernel
    ipvsadm.py    dsnat's own command: rules.py edits zones and pools, listing.py prints

Standard library only, and little of it: it runs on the appliance and must start at once.
"""
