package gemmamtp.demo

import gemmamtp.core.InputError
import java.io.BufferedReader
import java.io.File
import java.io.IOException
import java.net.InetAddress
import java.net.ServerSocket
import java.net.Socket
import java.security.MessageDigest
import kotlin.concurrent.thread
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertNull
import kotlin.test.assertTrue

/** Serves files, whole or from a byte on, one request a connection. */
private class FileServer(private val files: Map<String, ByteArray>) {
    private val socket = ServerSocket(0, 50, InetAddress.getLoopbackAddress())
    val url = "http://${socket.inetAddress.hostAddress}:${socket.localPort}/some/toy/"

    /** Each request's file, and its first byte. */
    val asked = ArrayList<Pair<String, Int>>()
    private val server = thread(isDaemon = true) {
        try {
            while (true) socket.accept().use(::answer)
        } catch (_: IOException) { // it was closed
        }
    }

    private fun answer(client: Socket) {
        val lines = client.getInputStream().bufferedReader().headers()
        val name = lines.first().substringAfterLast("toy/").substringBefore(" ")
        val range = lines.find { it.startsWith("Range: bytes=", ignoreCase = true) }
        val from = range?.substringAfter("=")?.removeSuffix("-")?.toInt() ?: 0
        synchronized(asked) { asked.add(name to from) }
        val content = files.getValue(name)
        val part = "206 Partial Content\r\nContent-Range: bytes $from-${content.size - 1}/${content.size}"
        val status = if (range == null) "200 OK" else part
        val head = "HTTP/1.1 $status\r\nContent-Length: ${content.size - from}\r\nConnection: close\r\n\r\n"
        try {
            client.getOutputStream().write(head.toByteArray() + content.copyOfRange(from, content.size))
        } catch (_: IOException) { // it wants no more
        }
    }

    private fun BufferedReader.headers() = generateSequence { readLine()?.takeIf { it.isNotEmpty() } }.toList()

    fun close() {
        socket.close()
        server.join()
    }
}

class SessionDownloadTest {
    private val worker = ManualWorker()
    private val opener = FakeOpener()
    private val installed = newFolder()
    private val files = tinyBundle("w".repeat(1_000_000))
    private val server = FileServer(files)
    private val digest =
        MessageDigest.getInstance("SHA-256").digest(files.getValue("manifest.json")).joinToString("") { "%02x".format(it) }
    private val steps = ArrayList<Step>()
    private var stopAt = Long.MAX_VALUE
    private lateinit var session: Session

    @AfterTest
    fun close() = server.close()

    private fun begun() {
        session = Session(Bundles(installed, emptyList()), opener, { 1000L }, { false }, worker) {
            val work = session.screen.work
            if (work != null && steps.lastOrNull() != work.step) steps.add(work.step)
            if (work?.step == Step.DOWNLOADING && work.done >= stopAt) session.stop()
        }
    }

    private fun download() {
        begun() // as after the process has ended
        assertTrue(session.download(" ${server.url} ", "$digest\n"))
        worker.runAll()
    }

    @Test
    fun aDownloadIsOpenedOnTrialAndThenInItsPlace() {
        download()
        assertEquals(Phase.READY to null, session.screen.phase to session.screen.problem)
        assertEquals("toy", session.screen.bundle)
        assertEquals(listOf(Step.DOWNLOADING, Step.CHECKING, Step.LOADING, Step.CHECKING), steps)
        assertEquals(2, opener.opened)
        val here = File(installed, "toy").listFiles().orEmpty().associate { it.name to it.readBytes().size }
        assertEquals(files.mapValues { it.value.size }, here)
    }

    @Test
    fun aDownloadThatWasStoppedGoesOnWhereItWas() {
        stopAt = 300_000
        download()
        assertEquals(Phase.IDLE, session.screen.phase)
        assertNull(session.screen.problem)
        assertFalse(File(installed, "toy").exists())
        stopAt = Long.MAX_VALUE
        server.asked.clear()
        download()
        assertEquals(Phase.READY, session.screen.phase)
        val (name, from) = server.asked.first()
        assertEquals("model.pte", name)
        assertTrue(from >= 300_000, "$from")
    }

    @Test
    fun aBundleThatMemoryIsTooShortForIsPutInItsPlaceUnopened() {
        opener.needed = 1001
        download()
        assertEquals(Problem.MemoryShort(1001, 1000), session.screen.problem)
        assertEquals(0, opener.opened)
        assertEquals(1_000_000, File(installed, "toy/model.pte").length())
        assertTrue(session.reopen())
        worker.runAll()
        assertEquals(Phase.READY, session.screen.phase)
    }

    @Test
    fun aBundleThatCannotBeOpenedDoesNotTakeTheOldOnesPlace() {
        put(File(installed, "toy"), tinyBundle())
        opener.failure = InputError("not for this phone")
        download()
        assertEquals(Problem.Refused("not for this phone"), session.screen.problem)
        assertEquals(128, File(installed, "toy/model.pte").length())
        opener.failure = null
        server.asked.clear()
        download()
        assertEquals(emptyList(), server.asked, "all of it is here")
        assertEquals(1_000_000, File(installed, "toy/model.pte").length())
    }
}
