package gemmamtp.download

import gemmamtp.core.MANIFEST
import java.io.FilterInputStream
import java.io.IOException
import java.io.InterruptedIOException
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** A bundle that is copied goes the way of one that is downloaded. */
class CopyTest : DownloadCase() {
    private val asked = ArrayList<String>()
    private val open = HashSet<String>()

    /** Files of the bundle, of which some are changed; a file breaks off after so many bytes. */
    private fun files(changed: Map<String, ByteArray?> = emptyMap(), breaking: String = "", after: Int = 0) = BundleFiles { name ->
        asked.add(name)
        val content = if (name in changed) changed[name] else bundle[name]
        content?.let {
            open.add(name)
            object : FilterInputStream(it.inputStream()) {
                private var left = if (name == breaking) after else Int.MAX_VALUE

                override fun skip(count: Long) = super.skip(minOf(count, 7)) // as some providers do

                override fun read(into: ByteArray, offset: Int, length: Int): Int {
                    if (left <= 0) throw SecurityException("the cable\nis out")
                    return super.read(into, offset, minOf(length, 50)).also { left -= it }
                }

                override fun close() = super.close().also { open.remove(name) }
            }
        }
    }

    @Test
    fun aBundleIsCopiedAndOpenedBeforeItIsInPlace() {
        val seen = ArrayList<Long>()
        copyBundle(files(), place, { done, _ -> seen.add(done) }) { assertSame(bundle, it) }
        assertInstalled()
        assertEquals(0L to bundleBytes, seen.first() to seen.last())
        asked.clear()
        copyBundle(files(), place)
        assertEquals(listOf(MANIFEST), asked, "it is in place")
    }

    @Test
    fun aCopyThatWasInterruptedGoesOn() {
        val line = refused { copyBundle(files(breaking = "w", after = 300), place) }
        assertTrue(line.startsWith("w: cannot be read (SecurityException: the cable"), line)
        assertTrue("what was copied is kept, try again" in line, line)
        assertEquals(300, part("w").length())
        val seen = ArrayList<Long>()
        copyBundle(files(), place, { done, _ -> seen.add(done) })
        assertInstalled()
        assertTrue(300L in seen)
        place.deleteRecursively()
        assertFailsWith<Ended> { copyBundle(files(), place, { done, _ -> if (done >= 1000) throw Ended() }) }
        asked.clear()
        copyBundle(files(), place)
        assertTrue("w" !in asked, "$asked")
        assertInstalled()
        assertEquals(emptySet(), open)
    }

    @Test
    fun anInterruptIsNoFailureOfTheSource() {
        val interrupted = BundleFiles { throw InterruptedIOException("the app wants an end") }
        assertFailsWith<InterruptedIOException> { copyBundle(interrupted, place) }
    }

    @Test
    fun whatIsMissingOrDamagedIsNamedAndTheOldBundleStays() {
        val old = bundle
        copyBundle(files(), place)
        bundle = bundleOf("w" to bytes(9, 1000), "v w" to bytes(2, 250))
        val wrong = listOf<Pair<Map<String, ByteArray?>, String>>(
            mapOf("w" to null) to "w: is missing",
            mapOf("w" to bytes(3, 1000)) to "w: has the sha256",
            mapOf("w" to bytes(9, 999)) to "ended after 999 of 1000 bytes",
            mapOf(MANIFEST to null) to "$MANIFEST: is missing; pick the folder",
            mapOf(MANIFEST to "{}".toByteArray()) to "format_version",
        )
        for ((changed, expected) in wrong) {
            val line = refused { copyBundle(files(changed), place) }
            assertTrue(expected in line, line)
            assertSame(old, place)
            aside.deleteRecursively()
        }
        assertFailsWith<IOException> { copyBundle(files(), place) { throw IOException("it does not open") } }
        assertSame(old, place)
        copyBundle(files(), place)
        assertInstalled()
    }
}
