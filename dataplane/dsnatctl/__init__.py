"""The operator's command for the engine: it speaks to the control socket, and to nothing else.

    __main__.py   verbs: parses arguments, prints, exits
    client.py     one line of JSON there, one back
    show.py       answers as tables for people
    plan.py       what a file would change        rfc.py            what the settings give up
    metrics.py    the page for Prometheus         deterministic.py  whose a port is, by arithmetic
    release.py    takes away what the engine leaves in the kernel
    ipvsadm.py    dsnat's own command: rules.py edits zones and pools, listing.py prints

Standard library only, and little of it: it runs on the appliance and must start at once.
"""
