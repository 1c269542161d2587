"""The alternatives to a bundle, each set up as well as we can.

Each module has a `contestants.Contestant`: a class built from a folder and a number of threads. A module that cannot
read a checkpoint or a bundle directly also has `convert(source, output)`, which runs as a script.
"""
