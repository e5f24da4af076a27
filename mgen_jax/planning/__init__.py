"""What a step will need on hardware that is not here: compile, read the program, bound its time."""
