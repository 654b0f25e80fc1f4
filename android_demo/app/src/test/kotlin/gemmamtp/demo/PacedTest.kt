package gemmamtp.demo

import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

private const val START = 1_000_000_000L

class PacedTest {
    private var now = START // a device that has been on for long
    private val waiting = ArrayList<Pair<Long, () -> Unit>>()
    private val runs = ArrayList<Long>()
    private val paced = Paced(66, { now }, ::later, { runs.add(now - START) })

    private fun later(delay: Long, run: () -> Unit) {
        assertTrue(delay in 0..66, "$delay")
        waiting.add(now + delay to run)
    }

    private fun passTo(time: Long) {
        while (true) {
            val next = waiting.filter { it.first <= time }.minByOrNull { it.first } ?: break
            waiting.remove(next)
            now = maxOf(now, next.first)
            next.second()
        }
        now = time
    }

    @Test
    fun aThousandRequestsASecondRunFifteenTimes() {
        for (time in 0L..1000L) {
            passTo(START + time)
            paced.request()
        }
        assertEquals((0L..990L step 66).toList(), runs)
    }

    @Test
    fun theLastRequestIsNeverLost() {
        paced.request()
        passTo(START + 1)
        paced.request()
        passTo(START + 500)
        assertEquals(listOf(0L, 66L), runs)
        paced.request()
        passTo(START + 500)
        assertEquals(listOf(0L, 66L, 500L), runs)
    }

    @Test
    fun aRequestDuringARunIsNotLost() {
        var times = 0
        lateinit var again: Paced
        again = Paced(66, { now }, ::later) {
            if (times++ == 0) again.request()
        }
        again.request()
        passTo(START + 500)
        assertEquals(2, times)
    }
}
