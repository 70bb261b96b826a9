"""How fast a gate is, lately: what a deadline has to be compared with."""

LATELY = 8  # measurements that count as lately


class Pace:
    """Running averages; a machine that others use too is not as fast as it was at the start.

    Attributes:
        speed: prompts per second while others waited; 0: not known yet.
        turn: seconds from a prompt's turn to its verdict, nearly always.
    """

    def __init__(self) -> None:
        self.speed = self.turn = 0.0
        self._mean = self._deviation = 0.0

    def measured(self, speed: float) -> None:
        """Take a speed that was measured on its own."""
        self.speed = speed

    def took(self, prompts: int, seconds: float) -> None:
        """Count a round that ended with so many verdicts, while others waited."""
        speed = prompts / seconds
        self.speed = speed if not self.speed else self.speed + (speed - self.speed) / LATELY

    def had_its_turn(self, seconds: float) -> None:
        """Count a prompt's seconds from its turn to its verdict: mean and mean deviation, as TCP times its packets."""
        if not self._mean:
            self._mean, self._deviation = seconds, 0.0
        self._deviation += (abs(seconds - self._mean) - self._deviation) / LATELY
        self._mean += (seconds - self._mean) / LATELY
        self.turn = self._mean + 2 * self._deviation

    def wait(self, prompts: int) -> float:
        """Return the seconds until a prompt behind so many others has its verdict; 0: not known yet."""
        return prompts / self.speed + self.turn if self.speed else 0.0
