"""The operator's command for the engine: it speaks to the control socket, and to nothing else.

    __main__.py   verbs: parses arguments, prints, exits
    client.py     one line of JSON there, one back
    show.py       answers as tables for people
    release.py    takes away what the engine leaves in the kernel

Standard library only, and little of it: it runs on the appliance and must start at once.
"""
