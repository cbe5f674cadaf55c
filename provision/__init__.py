"""dsnat-fleet: gateways described in one file, pushed over SSH, and undone if they cut themselves off."""
