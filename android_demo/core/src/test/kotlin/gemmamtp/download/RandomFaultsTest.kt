package gemmamtp.download

import gemmamtp.core.InputError
import gemmamtp.core.MANIFEST
import java.util.Random
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

private const val DOWNLOADS = 200

/** Downloads with random faults of the server and of the app, each over the bundle of the one before. */
class RandomFaultsTest : DownloadCase() {
    private fun fault(random: Random, honest: Answer): Answer {
        val size = honest.body.size
        val part = random.nextInt(size + 1)
        return when (random.nextInt(12)) {
            0 -> honest.copy(breakAfter = part)
            1 -> honest.copy(body = honest.body.clone().also { if (size > 0) it[random.nextInt(size)]++ })
            2 -> honest.copy(body = honest.body.copyOf(part))
            3 -> honest.copy(body = honest.body.copyOf(part)).withoutLength()
            4 -> honest.with("Content-Length", "$part")
            5 -> honest.with("Content-Length", "${size + part}")
            6 -> honest.copy(body = honest.body + ByteArray(part + 1)).withoutLength()
            7 -> Answer(listOf(500, 503, 416, 404, 206, 302, 429)[random.nextInt(7)])
            8 -> honest.with("Content-Range", "bytes $part-$size/${size + random.nextInt(2)}")
            9 -> honest.copy(status = -1, breakAfter = part)
            10 -> Answer(200, bytes(part, part), breakAfter = random.nextInt(part + 1))
            else -> honest.with("Content-Encoding", "br")
        }
    }

    @Test
    fun theBundleArrivesOrAnErrorOfOneLineAndThenTheBundle() {
        val random = Random(1)
        val counts = HashMap<String, Int>()
        for (run in 0 until DOWNLOADS) {
            val old = bundle
            // Few contents, so that bundles often share some.
            val contents = List(1 + random.nextInt(4)) { random.nextInt(20).let { bytes(it, 50 * it) } }
            serve(bundleOf(*contents.mapIndexed { i, content -> (if (i == 0) "w" else "f$i") to content }.toTypedArray()))
            if (run > 0 && sha(old.getValue(MANIFEST)) == sha(bundle.getValue(MANIFEST))) continue
            val chance = random.nextInt(100)
            val seed = random.nextLong()
            server.change = { request, honest ->
                val own = Random(seed + server.requests.size)
                // Other bytes under the same name, as after an upload, honestly sent.
                val other = if (own.nextInt(100) < chance / 4) bytes(own.nextInt(), bundle[request.name]?.size ?: 0) else null
                val from = request.from ?: 0
                if (own.nextInt(100) < chance) fault(own, honest)
                else if (other != null && honest.status < 300) honest.copy(body = other.copyOfRange(from, other.size))
                else honest
            }
            var end = if (random.nextInt(3) > 0) Int.MAX_VALUE else random.nextInt(30)
            for (attempt in 0..3) {
                val outcome = try {
                    if (attempt == 3) server.change = { _, honest -> honest }
                    if (attempt == 3) end = Int.MAX_VALUE
                    download(progress = { _, _ -> if (end-- == 0) throw Ended() })
                    "installed"
                } catch (error: InputError) {
                    assertEquals(1, error.message.orEmpty().lines().size, error.message)
                    error.message!!.substringAfter(": ").replace(Regex("[0-9a-f]{64}|[0-9]+"), "N")
                } catch (_: Ended) {
                    "ended"
                }
                counts[outcome] = (counts[outcome] ?: 0) + 1
                if (outcome == "installed") break
                assertTrue(attempt < 3, "run $run: $outcome")
                if (run > 0) assertSame(old, place)
            }
            assertInstalled()
        }
        assertTrue(counts.getValue("installed") > 190 && counts.getValue("ended") > 10 && counts.size > 8, "$counts")
    }
}
