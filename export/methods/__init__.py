"""What each captioning method adds to the graphs."""
