package gemmamtp.demo

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import androidx.core.app.NotificationChannelCompat
import androidx.core.app.NotificationCompat
import androidx.core.app.NotificationManagerCompat
import androidx.work.BackoffPolicy
import androidx.work.Constraints
import androidx.work.Data
import androidx.work.ExistingWorkPolicy
import androidx.work.ForegroundInfo
import androidx.work.NetworkType
import androidx.work.OneTimeWorkRequest
import androidx.work.WorkManager
import androidx.work.Worker
import androidx.work.WorkerParameters
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit

/** Names of the one work, of the preferences, and of the notification's channel. */
private const val DOWNLOAD = "download"
private const val URL = "url"
private const val DIGEST = "digest"
private const val NOTIFICATION = 1

/** How often a download begins again by itself, and after how many seconds more each time; each loss of the network counts. */
private const val MOST_ATTEMPTS = 20
private const val BACKOFF_SECONDS = 10L

/** ServiceInfo.FOREGROUND_SERVICE_TYPE_DATA_SYNC, which the classes of the packaging check lack. */
private const val DATA_SYNC = 1

/**
 * A bundle to download.
 *
 * @property url address of the folder with its files.
 * @property digest hexadecimal sha256 of its manifest.
 */
data class Download(val url: String, val digest: String)

/** Start a download as soon as there is a network, in place of one that waits; it outlives the process. */
fun startDownload(context: Context, download: Download) {
    context.getSharedPreferences(DOWNLOAD, Context.MODE_PRIVATE).edit()
        .putString(URL, download.url).putString(DIGEST, download.digest).apply()
    val work = OneTimeWorkRequest.Builder(DownloadWorker::class.java)
        .setInputData(Data.Builder().putString(URL, download.url).putString(DIGEST, download.digest).build())
        .setConstraints(Constraints.Builder().setRequiredNetworkType(NetworkType.CONNECTED).build())
        .setBackoffCriteria(BackoffPolicy.LINEAR, BACKOFF_SECONDS, TimeUnit.SECONDS)
        .build()
    WorkManager.getInstance(context).enqueueUniqueWork(DOWNLOAD, ExistingWorkPolicy.REPLACE, work)
}

/** The download that was started last; empty texts if there was none. */
fun lastDownload(context: Context): Download {
    val last = context.getSharedPreferences(DOWNLOAD, Context.MODE_PRIVATE)
    return Download(last.getString(URL, "").orEmpty(), last.getString(DIGEST, "").orEmpty())
}

/**
 * Keeps the process alive, with a notification, while the session downloads; the session's screen shows the rest.
 *
 * A download that begins in the background is a plain job, which the system stops after minutes and begins again later.
 */
class DownloadWorker(context: Context, parameters: WorkerParameters) : Worker(context, parameters) {
    @Volatile private var downloading = false
    private val session get() = (applicationContext as DemoApp).session

    override fun doWork(): Result {
        val url = inputData.getString(URL)
        val digest = inputData.getString(DIGEST)
        // A bundle that ends the process when it is opened would do so each time.
        if (url == null || digest == null || runAttemptCount >= MOST_ATTEMPTS) return Result.failure()
        val ended = CountDownLatch(1)
        if (!session.download(url, digest, ended::countDown)) return Result.retry() // it does something else
        if (mayBeSeen()) setForegroundAsync(ForegroundInfo(NOTIFICATION, notification(), DATA_SYNC))
        downloading = true
        if (isStopped) session.stop()
        ended.await()
        downloading = false
        return Result.success() // or the screen says why not, and the user asks again
    }

    override fun onStopped() {
        if (downloading) session.stop()
    }

    /** Android 12 and later refuse this in the background, after WorkManager has taken the job out of the system's hands. */
    private fun mayBeSeen(): Boolean {
        if (Build.VERSION.SDK_INT < 31) return true
        val state = ActivityManager.RunningAppProcessInfo().also(ActivityManager::getMyMemoryState)
        return state.importance <= ActivityManager.RunningAppProcessInfo.IMPORTANCE_FOREGROUND
    }

    private fun notification() = NotificationCompat.Builder(applicationContext, DOWNLOAD)
        .setSmallIcon(R.drawable.ic_launcher_foreground)
        .setContentTitle(applicationContext.getString(R.string.download_title))
        .setProgress(0, 0, true)
        .setOngoing(true)
        .build()
        .also { NotificationManagerCompat.from(applicationContext).createNotificationChannel(channel()) }

    private fun channel() = NotificationChannelCompat.Builder(DOWNLOAD, NotificationManagerCompat.IMPORTANCE_LOW)
        .setName(applicationContext.getString(R.string.download_title))
        .build()
}
