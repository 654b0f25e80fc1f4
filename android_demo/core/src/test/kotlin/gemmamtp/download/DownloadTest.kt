package gemmamtp.download

import gemmamtp.core.MANIFEST
import java.io.IOException
import java.util.concurrent.CountDownLatch
import kotlin.test.BeforeTest
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Whatever a server does, the bundle that was meant arrives, or an error of one line. */
class DownloadTest : DownloadCase() {
    @BeforeTest
    fun begin() = serve()

    /** Let the first request for "w" end after so many bytes. */
    private fun breakOnce(after: Int) = onceFor("w", { it.copy(breakAfter = after) })

    /** Change the answers to the first requests for a file. */
    private fun onceFor(name: String, vararg changes: (Answer) -> Answer) {
        val left = ArrayDeque(changes.toList())
        server.change = { request, honest ->
            val change = if (request.name == name) synchronized(left) { left.removeFirstOrNull() } else null
            change?.invoke(honest) ?: honest
        }
    }

    @Test
    fun eachFileIsFetchedOnceAndOpenedBeforeItIsInPlace() {
        val seen = ArrayList<Pair<Long, Long>>()
        val result = download(progress = { done, total -> seen.add(done to total) }) {
            assertSame(bundle, it)
            assertTrue(!place.exists())
        }
        assertEquals(place, result)
        assertInstalled()
        assertEquals(listOf("bundle.download"), opened)
        assertEquals(listOf(MANIFEST, "w", "v%20w"), server.asked())
        assertEquals(0L to 0L, seen.first())
        assertEquals(bundleBytes to bundleBytes, seen.last())
        assertEquals(seen.map { it.first }.sorted(), seen.map { it.first })
        assertTrue(server.requests.all { it.headers["accept-encoding"] == "identity" })
    }

    @Test
    fun aBundleThatIsInPlaceIsNotFetched() {
        download()
        server.requests.clear()
        download()
        assertEquals(emptyList(), server.asked())
        assertEquals(1, opened.size)
        assertInstalled()
    }

    @Test
    fun anotherManifestIsRefusedWithBothDigests() {
        val digest = sha(bundle.getValue(MANIFEST))
        server.files[MANIFEST] = manifestOf(mapOf("w" to bytes(3, 5)))
        val line = refused { download(digest) }
        assertTrue("${server.url}$MANIFEST: has the sha256 ${sha(server.files.getValue(MANIFEST))}, expected $digest" in line, line)
        assertEquals(listOf(MANIFEST), server.asked())
    }

    @Test
    fun aManifestWithoutAnEndIsRefusedAndAShortOneFetchedAgain() {
        onceFor(MANIFEST, { it.copy(breakAfter = 100) })
        download()
        assertInstalled()
        assertEquals(listOf(1), pauses)
        serve(bundleOf("w" to bytes(4, 10)))
        onceFor(MANIFEST, { Answer(200, ByteArray((1 shl 24) + 5000), emptyMap()) })
        assertTrue("this is not the bundle that was meant" in refused())
        assertTrue(server.sent < (1 shl 24) + 10_000)
    }

    @Test
    fun malformedDigestsAndAddressesAreRefused() {
        for (digest in listOf("", "0".repeat(63), "g".repeat(64), "\n".repeat(64))) {
            assertTrue("the digest is" in refused { download(digest) })
        }
        for (url in listOf("", "bundle", "file:///bundle", "ftp://a/b", "http://a/b?c", "http://a/b#c", "http://a/\nb")) {
            assertTrue("not the address of a folder" in refused { download(url = url) }, url)
        }
        val digest = sha(bundle.getValue(MANIFEST)).uppercase()
        download(digest, url = server.url.trimEnd('/'))
        assertInstalled()
    }

    @Test
    fun namesAndSizesOfAManifestCannotLeadElsewhere() {
        for (name in listOf("", ".", "..", "../w", "/w", "a/b", "a\\\\b", ".w.part", "a\\nb", "a\\u0000b", MANIFEST)) {
            serve(bundleOf("w" to bytes(1, 3), name to bytes(2, 3)))
            assertTrue("expected a plain name" in refused() || "outside the bundle" in refused(), name)
        }
        val manifest = String(manifestOf(mapOf("w" to bytes(1, 3))))
        for (digest in listOf("", "../../x", sha(bytes(1, 3)).uppercase())) {
            serve(mapOf(MANIFEST to manifest.replace(sha(bytes(1, 3)), digest).toByteArray()))
            assertTrue("expected 64 hexadecimal digits" in refused(), digest)
        }
        assertEquals(setOf(MANIFEST), server.asked().toSet())
        assertEquals(setOf("bundle.download/.$MANIFEST", "bundle.lock"), filesOf(folder).keys)
    }

    /** Broken off after each number of bytes: the rest is asked for, and no byte is sent twice. */
    @Test
    fun aDownloadGoesOnWhereItBrokeOff() {
        for (after in listOf(0, 1, 99, 100, 101, 500, 999)) {
            breakOnce(after)
            download()
            assertInstalled()
            assertEquals(listOf(MANIFEST, "w", if (after > 0) "w@$after" else "w", "v%20w"), server.asked())
            assertEquals(bundle.values.sumOf { it.size }, server.sent)
            place.deleteRecursively()
            server.requests.clear()
            server.sent = 0
        }
    }

    @Test
    fun failuresCountOnlyInARow() {
        server.change = { _, honest -> if (honest.status < 300) honest.copy(breakAfter = 50) else honest }
        serve(bundleOf("w" to bytes(1, 1000)))
        put(aside, mapOf(".$MANIFEST" to bundle.getValue(MANIFEST)))
        download()
        assertEquals(List(19) { 1 }, pauses)
        assertInstalled()
    }

    @Test
    fun aServerThatStaysBrokenIsLeftAfterSomeTriesAndTheNextDownloadGoesOn() {
        var broken = false
        server.change = { request, honest ->
            if (request.name != "w") honest else if (broken) Answer(503) else honest.copy(breakAfter = 300).also { broken = true }
        }
        val line = refused()
        assertTrue("${server.url}w: answers with status 503" in line && "try again later" in line, line)
        assertEquals(listOf(1, 2), pauses)
        assertEquals(300, part("w").length())
        server.change = { _, honest -> honest }
        server.requests.clear()
        download()
        assertEquals(listOf("w@300", "v%20w"), server.asked())
        assertInstalled()
    }

    @Test
    fun whatIsNoFailureOfTheMomentIsNotTriedAgain() {
        for (status in listOf(204, 206, 400, 401, 403, 404, 410)) {
            onceFor("w", { it.copy(status = status, body = ByteArray(0)) })
            val line = refused()
            assertTrue("${server.url}w: answers with status $status" in line, line)
        }
        assertEquals(emptyList(), pauses)
        server.close()
        assertTrue("ConnectException" in refused())
        assertEquals(listOf(1, 2), pauses)
    }

    @Test
    fun whatIsNoHttpAndAServerThatIsBusyAreFailuresOfTheMoment() {
        onceFor("w", { it.copy(status = -5) }, { it.with("Content-Length", "x").copy(status = 429) })
        download()
        assertInstalled()
        assertEquals(listOf(1, 2), pauses)
    }

    @Test(timeout = 20_000)
    fun aSilentServerIsLeft() {
        val end = CountDownLatch(1)
        server.change = { _, honest -> honest.also { end.await() } }
        assertTrue("$MANIFEST: SocketTimeoutException" in refused { download(readMillis = 1) })
        assertEquals(listOf(1, 2), pauses)
        end.countDown()
    }

    @Test
    fun redirectsAreFollowedWithTheRangeButNotToAnotherProtocol() {
        val content = bundle.getValue("w")
        server.files["elsewhere"] = content
        server.change = { request, honest ->
            if (request.name == "w") Answer(302).with("Location", "elsewhere")
            else if (request.name == "elsewhere" && request.from == null) honest.copy(breakAfter = 400) else honest
        }
        download()
        assertInstalled()
        assertEquals(listOf("w", "elsewhere", "w@400", "elsewhere@400"), server.asked().filter { it[0] in "we" })
        place.deleteRecursively()
        for (other in listOf("https://127.0.0.1:1/w", "file:///w")) {
            onceFor("w", { Answer(302).with("Location", other) })
            val line = refused()
            assertTrue("answers with status 302 and sends to '$other'" in line, line)
        }
        server.change = { request, honest -> if (request.name == "w") Answer(302).with("Location", "http://127.0.0.1:99999/") else honest }
        assertTrue("IllegalArgumentException" in refused())
    }

    /** A server without ranges: what is here already is not lost when it breaks off again, nor written twice. */
    @Test
    fun aWholeFileInPlaceOfARangeIsReadUpToWhatIsMissing() {
        val cut = ArrayDeque(listOf(600, 300, 900))
        server.change = { request, honest ->
            if (request.name != "w") honest else server.whole("w").let { it.copy(breakAfter = cut.removeFirstOrNull() ?: 1000) }
        }
        var most = 0L
        download(progress = { done, _ -> assertTrue(done >= most).also { most = done } })
        assertInstalled()
        assertEquals(listOf("w", "w@600", "w@600", "w@900"), server.asked().filter { it[0] == 'w' })
        assertEquals(listOf(1, 2, 1), pauses)
    }

    @Test
    fun aRangeThatIsRefusedOrAnotherIsAnsweredByTheWholeFile() {
        val wrong: List<(Answer) -> Answer> = listOf(
            { Answer(416) },
            { it.with("Content-Range", "bytes 0-999/1000") },
            { it.with("Content-Range", "bytes 500-999/1001") },
            { it.with("Content-Range", "chapters 1-2/3") },
            { it.copy(headers = it.headers - "Content-Range") },
        )
        for (change in wrong) {
            server.requests.clear()
            onceFor("w", { it.copy(breakAfter = 500) }, change)
            download()
            assertInstalled()
            assertEquals(listOf("w", "w@500", "w"), server.asked().filter { it[0] == 'w' })
            place.deleteRecursively()
        }
    }

    @Test
    fun aRangeThatIsCutShortIsCompleted() {
        onceFor("w", { it.copy(breakAfter = 500) }, { Answer(206, it.body.copyOf(200)).with("Content-Range", "bytes 500-699/1000") })
        download()
        assertInstalled()
        assertEquals(listOf("w", "w@500", "w@700"), server.asked().filter { it[0] == 'w' })
    }

    /** As a network does that wants the user to sign in: what was fetched must survive it. */
    @Test
    fun anAnswerOfAnotherLengthIsNotReadAndChangesNothing() {
        val page = Answer(200, ByteArray(77) { 'x'.code.toByte() })
        for (length in listOf(page, page.with("Content-Length", "1001"), page.with("Content-Length", "${Long.MAX_VALUE}"))) {
            onceFor("w", { it.copy(breakAfter = 500) }, { length }, { length })
            val line = refused()
            assertTrue("w: has ${length.headers["Content-Length"]} bytes, expected 1000" in line, line)
            assertEquals(500, part("w").length())
            assertTrue(part("w").readBytes().contentEquals(bundle.getValue("w").copyOf(500)))
            aside.deleteRecursively()
        }
        val longer: (Answer) -> Answer = { it.with("Content-Length", "501") }
        onceFor("w", { it.copy(breakAfter = 500) }, longer, longer)
        assertTrue("w: has 1001 bytes, expected 1000" in refused())
        onceFor("w", longer)
        download()
        assertInstalled()
    }

    @Test
    fun nothingIsWrittenBeyondTheSize() {
        onceFor("w", { Answer(200, it.body + ByteArray(5000)).withoutLength() })
        download(progress = { _, _ -> assertTrue(part("w").length() <= 1000) })
        assertInstalled()
    }

    @Test
    fun compressedFilesAreRefused() {
        server.change = { request, honest -> if (request.name == "w") honest.with("Content-Encoding", "gzip") else honest }
        assertTrue("w: is sent as gzip" in refused())
        server.change = { _, honest -> honest.with("Content-Encoding", "br") }
        aside.deleteRecursively()
        assertTrue("$MANIFEST: is sent as br" in refused())
    }

    @Test
    fun wrongBytesAreFetchedOnceMore() {
        val wrong = bytes(9, 1000)
        onceFor("w", { it.copy(body = wrong) })
        val seen = ArrayList<Long>()
        download(progress = { done, _ -> seen.add(done) })
        assertInstalled()
        assertEquals(listOf("w", "w"), server.asked().filter { it[0] == 'w' })
        assertEquals(bundleBytes, seen.last())
        place.deleteRecursively()
        server.requests.clear()
        server.change = { request, honest -> if (request.name == "w") honest.copy(body = wrong) else honest }
        val line = refused()
        assertTrue("w: has the sha256 ${sha(wrong)}, expected ${sha(bundle.getValue("w"))}" in line, line)
        assertEquals(listOf("w", "w"), server.asked().filter { it[0] == 'w' })
        assertEquals(0, part("w").length(), "wrong bytes go")
        assertEquals(emptyList(), pauses)
    }

    @Test
    fun aFileThatChangesBetweenTwoRangesIsFetchedFromItsFirstByte() {
        onceFor("w", { Answer(200, bytes(9, 1000), breakAfter = 500) })
        download()
        assertInstalled()
        assertEquals(listOf("w", "w@500", "w"), server.asked().filter { it[0] == 'w' })
    }

    @Test
    fun noRoomIsAnErrorBeforeTheFirstFile() {
        serve(bundleOf("w" to bytes(1, 3_000_000)))
        val line = refused { download(usableSpace = { 2_999_999 }) }
        assertTrue("needs 4 MB, 2 MB are free" in line, line)
        assertEquals(listOf(MANIFEST), server.asked())
        // What is here already needs none.
        put(aside, mapOf(part("w").name to bytes(1, 1_000_000)))
        download(usableSpace = { 2_000_000 }, blockBytes = 1 shl 16)
        place.deleteRecursively()
        val huge = String(manifestOf(mapOf("w" to bytes(1, 3), "v" to bytes(2, 3), "u" to bytes(3, 3))))
        serve(mapOf(MANIFEST to huge.replace("\"size\": 3", "\"size\": 4611686018427387903").toByteArray()))
        assertTrue("MB are free" in refused { download(usableSpace = { 1L shl 50 }) })
    }

    @Test
    fun errorsOfTheAppArePassedOn() {
        assertFailsWith<Ended> { download(progress = { _, _ -> throw Ended() }) }
        assertFailsWith<IOException> { download { throw IOException("its own") } }
        assertFailsWith<IOException> { download(progress = { done, _ -> if (done > 300) throw IOException("its own") }) }
        assertEquals(emptyList(), pauses)
    }
}
