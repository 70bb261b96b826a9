"""Files of prompts scored, resumably."""
