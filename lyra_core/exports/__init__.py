"""What other programs take: surfaces, USD, and one folder with everything."""
