"""What a run is made of: its parts, its epochs, its files, and what is done with it afterwards."""
