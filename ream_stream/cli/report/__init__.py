"""The verb `report`: one self-contained page about an output."""
