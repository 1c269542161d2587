"""What a user could take in place of a bundle, each set up as well as we can.

A module has a class that is built from a folder and a number of threads and captions (`contestants.Contestant`); one
that reads neither the checkpoint nor a bundle as it is also has `convert(source, output)`, run as a script.
"""
