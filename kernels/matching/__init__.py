"""What reads tiles of scores and forgets them: best matches, cost rows, attention mass."""
