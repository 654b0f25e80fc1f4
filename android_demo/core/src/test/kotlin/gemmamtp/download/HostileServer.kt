package gemmamtp.download

import java.io.Closeable
import java.io.IOException
import java.net.InetAddress
import java.net.ServerSocket
import java.net.Socket
import java.util.concurrent.ConcurrentHashMap
import java.util.concurrent.CopyOnWriteArrayList
import java.util.concurrent.Executors
import kotlin.concurrent.thread

/** A request for a file; [from] is the first byte of the range that it asks for, null if it asks for none. */
internal class Request(val name: String, val headers: Map<String, String>) {
    val from: Int? = headers["range"]?.removePrefix("bytes=")?.removeSuffix("-")?.toInt()
}

/**
 * What is sent.
 *
 * @property breakAfter bytes of the body after which the connection ends.
 */
internal data class Answer(
    val status: Int,
    val body: ByteArray = ByteArray(0),
    val headers: Map<String, String> = mapOf("Content-Length" to "${body.size}"),
    val breakAfter: Int = body.size,
) {
    fun with(name: String, value: String) = copy(headers = headers + (name to value))

    /** Without a length: the body ends with the connection. */
    fun withoutLength() = copy(headers = headers - "Content-Length")
}

/** A server on the loopback that knows ranges and is honest, until a test changes its answers. */
internal class HostileServer : Closeable {
    private val socket = ServerSocket(0, 50, InetAddress.getLoopbackAddress())
    val url = "http://127.0.0.1:${socket.localPort}/some/folder/"
    val files = ConcurrentHashMap<String, ByteArray>()
    val requests = CopyOnWriteArrayList<Request>()

    /** Bytes of bodies that were sent. */
    @Volatile
    var sent = 0

    /** Makes the answer to a request from the honest one. */
    @Volatile
    var change: (Request, Answer) -> Answer = { _, honest -> honest }

    private val workers = Executors.newCachedThreadPool { Thread(it).apply { isDaemon = true } }
    private val accepting = thread(isDaemon = true) {
        try {
            while (true) socket.accept().let { workers.execute { serve(it) } }
        } catch (_: IOException) {
            // closed
        }
    }

    /** Requests so far, as NAME or NAME@FROM. */
    fun asked() = requests.map { if (it.from == null) it.name else "${it.name}@${it.from}" }

    fun whole(name: String) = Answer(200, files.getValue(name))

    private fun honest(request: Request): Answer {
        val content = files[request.name] ?: return Answer(404, "no such file".toByteArray())
        val from = request.from ?: return Answer(200, content)
        if (from >= content.size) return Answer(416)
        return Answer(206, content.copyOfRange(from, content.size))
            .with("Content-Range", "bytes $from-${content.size - 1}/${content.size}")
    }

    private fun serve(connection: Socket) = try {
        connection.use {
            val lines = generateSequence(it.getInputStream().bufferedReader()::readLine).takeWhile(String::isNotEmpty).toList()
            if (lines.isNotEmpty()) {
                val headers = lines.drop(1).associate { line -> line.substringBefore(":").lowercase() to line.substringAfter(": ") }
                val name = lines[0].split(" ")[1].removePrefix("/some/folder/")
                val request = Request(name, headers)
                requests.add(request)
                val answer = change(request, honest(request))
                val head = listOf("HTTP/1.1 ${answer.status} x", "Connection: close") + answer.headers.map { (k, v) -> "$k: $v" }
                val body = answer.body.copyOf(minOf(answer.breakAfter, answer.body.size))
                synchronized(this) { sent += body.size }
                it.getOutputStream().write((head + "" + "").joinToString("\r\n").toByteArray() + body)
            }
        }
    } catch (_: IOException) {
        // the client went away
    }

    override fun close() {
        socket.close()
        accepting.join()
        workers.shutdown()
    }
}
