"""What every test shares. Importing mailroom first patches the sockets before `responses` comes."""

import mailroom  # noqa: F401  (the import is the monkey patch)
