"""`python -m itune` is `itune`."""

from .cli.umbrella import main

main()
