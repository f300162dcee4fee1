"""What a fine-tune is made of: its data checked, its trainer run, its adapter kept."""
