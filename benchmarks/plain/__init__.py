"""The baselines that are whole scripts: loops as they are written by hand, without anything of fivestep."""
