package gemmamtp.core

import java.io.File
import kotlin.test.Test
import kotlin.test.assertTrue

/** The texts of [Stress] on fake graphs. */
class StressTest {
    /** More of it: `java -Dstress=10000 -Dseed=7 ... org.junit.runner.JUnitCore gemmamtp.core.StressTest`. */
    @Test
    fun nothingIsLostWhateverHappensInATurn() = inTemporaryDirectory { directory ->
        val steps = System.getProperty("stress")?.toInt() ?: 200
        val seed = System.getProperty("seed")?.toLong() ?: 0
        val stress = Stress(seed, 550, File(directory, "session")) { watch, device ->
            val bundle = FakeBundle(directory, maxSeqLen = 600)
            val graphs = watch(mapOf("target" to bundle.target, "drafter" to bundle.drafter))
            val engine = loadEngine(directory, bundle.manifest, { _, _, _ -> graphs }, allocate = device::allocate)
            Decoder(engine, null, null, DraftLength(5, Costs(5, 2)), allocate = device::allocate)
        }
        val struck = stress.use { it.run(steps) }
        assertTrue(struck.values.all { it > steps / 50 }, "$struck")
    }
}
