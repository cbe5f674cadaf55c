# Words of dsnatctl for bash; there is no bash-completion package here that would load them.
if [ -n "$BASH_VERSION" ] && [ -r /usr/share/bash-completion/completions/dsnatctl ]; then
	. /usr/share/bash-completion/completions/dsnatctl
fi
