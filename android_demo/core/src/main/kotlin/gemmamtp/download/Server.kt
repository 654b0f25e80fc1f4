package gemmamtp.download

import gemmamtp.core.InputError
import java.io.IOException
import java.net.HttpURLConnection
import java.net.URL
import java.net.URLEncoder

private val CONTENT_RANGE = Regex("""bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)""")

/**
 * The folder of a bundle on a server.
 *
 * @param url its address.
 * @throws InputError the address is not one of HTTP or HTTPS.
 */
internal class Server(url: String, private val patience: Patience) : Source {
    private val folder = url.trimEnd('/')

    init {
        val protocol = try { URL(url).protocol } catch (_: IOException) { null }
        if (protocol !in listOf("http", "https") || url.any { it in "?#" || it.isISOControl() }) {
            throw InputError("'${shown(url)}': not the address of a folder; expected http or https, without ? and #")
        }
    }

    override val remedy get() = "upload the bundle again, or update the app"

    override fun address(name: String) = "$folder/${URLEncoder.encode(name, "UTF-8").replace("+", "%20")}"

    /** What brought new bytes does not count as a failure in a row. */
    override fun insist(name: String, length: () -> Long, work: () -> Unit) {
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
            patience.pause.after(failures)
        }
    }

    override fun open(name: String, from: Long, size: Long?): Body {
        if (from > 0) request(name, from, size)?.let { return it }
        return checkNotNull(request(name, 0, size))
    }

    /** Ask for a file or a range; returns null if the range is answered with none, or with another. */
    private fun request(name: String, from: Long, size: Long?): Body? {
        val connection = connection(name, from)
        var body: Body? = null
        try {
            val status = reading { connection.responseCode }
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
            body = Body(reading { connection.inputStream }, begin, length, connection::disconnect)
            return body
        } finally {
            if (body == null) connection.disconnect()
        }
    }

    private fun connection(name: String, from: Long) = reading {
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
