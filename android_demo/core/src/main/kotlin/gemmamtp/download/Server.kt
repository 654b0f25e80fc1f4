package gemmamtp.download

import gemmamtp.core.InputError
import gemmamtp.core.oneLine
import java.io.ByteArrayOutputStream
import java.io.Closeable
import java.io.IOException
import java.net.HttpURLConnection
import java.net.URL
import java.net.URLEncoder

private val CONTENT_RANGE = Regex("""bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)""")

/** The connection failed, or the server for the moment: it may do better later. */
internal class Broken(message: String, cause: Throwable? = null) : Exception(message, cause)

/** The server answered with something that cannot be the file. */
internal class OtherFile(message: String) : Exception(message)

/**
 * The folder of a bundle on a server.
 *
 * @param url its address.
 * @throws InputError the address is not one of HTTP or HTTPS.
 */
internal class Server(url: String, private val patience: Patience) {
    private val folder = url.trimEnd('/')

    init {
        val protocol = try { URL(url).protocol } catch (_: IOException) { null }
        if (protocol !in listOf("http", "https") || url.any { it in "?#" || it.isISOControl() }) {
            throw InputError("'${shown(url)}': not the address of a folder; expected http or https, without ? and #")
        }
    }

    fun address(name: String) = "$folder/${URLEncoder.encode(name, "UTF-8").replace("+", "%20")}"

    /**
     * Run [work], and again with pauses while it throws [Broken].
     *
     * @param length how far the file is; what brought new bytes does not count as a failure in a row.
     * @throws InputError it failed too often.
     */
    fun insist(name: String, length: () -> Long, work: () -> Unit) {
        var failures = 0
        while (true) {
            val before = length()
            try {
                return work()
            } catch (error: Broken) {
                failures = if (length() > before) 1 else failures + 1
                if (failures > patience.retries) {
                    throw InputError("${address(name)}: ${error.message}; what was fetched is kept, try again later", error)
                }
            }
            patience.pause(failures)
        }
    }

    /**
     * Ask for a file.
     *
     * @param from its first byte that is wanted; the body may begin before.
     * @param size of the file in bytes; null if it is not known.
     * @throws Broken no answer came, or one of a server with a problem.
     * @throws OtherFile the file has another size, or is compressed.
     * @throws InputError the server does not have the file, or sends elsewhere.
     */
    fun open(name: String, from: Long = 0, size: Long? = null): Body {
        if (from > 0) request(name, from, size)?.let { return it }
        return checkNotNull(request(name, 0, size))
    }

    /** Ask for a file or a range; returns null if the range is answered with none, or with another. */
    private fun request(name: String, from: Long, size: Long?): Body? {
        val connection = connection(name, from)
        var body: Body? = null
        try {
            val status = network { connection.responseCode }
            val range = connection.getHeaderField("Content-Range")?.let(CONTENT_RANGE::matchEntire)?.groupValues
            val begin = when {
                status == 200 -> 0
                status == 206 && from > 0 && range?.get(1) == "$from" && range[2] in listOf("*", "$size") -> from
                status in listOf(206, 416) && from > 0 -> return null
                else -> throw refusal(name, status, connection)
            }
            val length = connection.getHeaderField("Content-Length")?.toLongOrNull()
            checkLength(length, begin, size)
            val encoding = connection.getHeaderField("Content-Encoding") ?: "identity"
            if (encoding != "identity") throw OtherFile("is sent as ${shown(encoding)}, expected the bytes of the file")
            body = Body(connection, begin, length)
            return body
        } finally {
            if (body == null) connection.disconnect()
        }
    }

    private fun connection(name: String, from: Long) = network {
        val connection = URL(address(name)).openConnection() as HttpURLConnection
        connection.connectTimeout = patience.connectMillis
        connection.readTimeout = patience.readMillis
        connection.useCaches = false // an app's cache of answers would keep the bundle as well
        connection.instanceFollowRedirects = true // never from https to http: that class stays with a protocol
        connection.setRequestProperty("Accept-Encoding", "identity")
        if (from > 0) connection.setRequestProperty("Range", "bytes=$from-")
        connection
    }

    private fun refusal(name: String, status: Int, connection: HttpURLConnection): Exception = when (status) {
        in 500..599, 408, 429 -> Broken("answers with status $status")
        in Int.MIN_VALUE..99 -> Broken("answers with what is not HTTP")
        in 300..399 -> {
            val other = shown(connection.getHeaderField("Location").orEmpty())
            InputError("${address(name)}: answers with status $status and sends to '$other'; give the address that it leads to")
        }
        else -> InputError("${address(name)}: answers with status $status, expected a file of the bundle; check the address")
    }

    private fun checkLength(length: Long?, begin: Long, size: Long?) {
        if (length == null || size == null) return
        // A range may be cut short, and the rest is asked for; a whole file may not.
        if (length > size - begin || (begin == 0L && length < size)) {
            throw OtherFile("has ${begin + length} bytes, expected $size")
        }
    }
}

/**
 * A body of an answer.
 *
 * @property begin its first byte's place in the file.
 * @param announced how many bytes the server said that it has; null if it did not.
 */
internal class Body(private val connection: HttpURLConnection, val begin: Long, private val announced: Long?) : Closeable {
    private val stream = network { connection.inputStream }

    /** Read up to [most] bytes; returns how many, -1 at the end. */
    fun read(block: ByteArray, most: Int): Int = network { stream.read(block, 0, most) }

    /** All of it, but at most [limit] bytes and one more. */
    fun readAll(limit: Int): ByteArray {
        val all = ByteArrayOutputStream()
        val block = ByteArray(1 shl 12)
        while (all.size() <= limit) {
            val bytes = read(block, minOf(block.size, limit + 1 - all.size()))
            if (bytes < 0) break
            all.write(block, 0, bytes)
        }
        if (announced != null && all.size() < minOf(announced, limit.toLong())) {
            throw Broken("ended after ${all.size()} of $announced bytes")
        }
        return all.toByteArray()
    }

    /** End the connection, which is not worth keeping: there may be much left to read. */
    override fun close() = connection.disconnect()
}

private fun <T> network(work: () -> T): T =
    try {
        work()
    } catch (error: Exception) { // not IOException alone: an address that the server sends to may be malformed
        throw Broken("${error.javaClass.simpleName}: ${shown(oneLine(error))}", error)
    }
