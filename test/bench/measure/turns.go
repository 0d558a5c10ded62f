package measure

// Turns is the order in which n competitors have their turns in a round. A round and the next
// are each other's mirror image, and then somebody else begins.
func Turns(n, round int) []int {
	out := make([]int, n)
	for i := range out {
		k := i
		if round%2 == 1 {
			k = n - 1 - i
		}
		out[i] = (k + round/2) % n
	}
	return out
}
